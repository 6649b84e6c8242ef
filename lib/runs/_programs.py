"""Compiled programs are kept from one command to the next: JAX's persistent compilation cache."""

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import platform
import zlib
from pathlib import Path
from typing import Any

import jax

NAME = "kernel-flows"
MOST_BYTES = 200 * 2**20  # about 20,000 programs
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
_CHECKED = "checked"  # its modification time is that of the last look at new entries


def keep_compiled_programs() -> Path | None:
    """Turns the cache on, in `~/.cache/kernel-flows/HASH`, and returns that folder.

    HASH is of this machine's processor and of the versions of JAX and its plugins: a program that
    another machine or version has compiled is never loaded. `XDG_CACHE_HOME` moves the folder. Of
    programs beyond 200 MiB those go first that were not used for longest.

    Changes nothing, and returns None, where `JAX_COMPILATION_CACHE_DIR` names a folder,
    `JAX_ENABLE_COMPILATION_CACHE` is 0, or the folder cannot be written. Call it before JAX
    compiles anything.
    """
    config: Any = jax.config  # whose attributes not every version of JAX declares
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME
    about = _machine_and_versions()
    folder = home / hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_damaged(folder)
        _drop_oldest(home)
    except OSError:
        return None
    if not any("plugin" in line for line in about):
        _quieten()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Also those that compile in no time: a command has dozens, and reads one in a few milliseconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _quieten() -> None:
    """XLA takes "prefer-no-gather", which it compiles for on some processors, for a feature that
    they lack, and says so at length for every program that it loads. So nothing of its C++ below
    fatal errors is printed, unless the environment asks for another level than JAX's own, 1. Errors
    are raised all the same."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1" and "JAX_LOGGING_LEVEL" not in os.environ:
        jax.config.update("jax_logging_level", "CRITICAL")
        jax.config.update("jax_logging_level", None)  # of Python's loggers, which stay as they are


def _machine_and_versions() -> list[str]:
    about = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "flags", "Features")):
                about.append(line)
            elif not line:  # the first of the cores
                break
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about.append(f"{package} {importlib.metadata.version(package)}")
    return about


def _drop_damaged(folder: Path) -> None:
    """Entries that a full disk or a kill cut short, of which JAX would warn at every start."""
    stamp = folder / _CHECKED
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.touch()
    for entry in os.scandir(folder):
        if entry.name.endswith("-cache") and entry.stat().st_mtime >= since - 1:
            content = Path(entry.path).read_bytes()
            if not _whole(content):
                Path(entry.path).unlink(missing_ok=True)  # another process may have been here


def _whole(content: bytes) -> bool:
    """JAX compresses by zstandard where that is installed, else by zlib."""
    try:
        if content.startswith(b"\x28\xb5\x2f\xfd"):
            importlib.import_module("zstandard").ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except Exception:
        return False
    return True


def _drop_oldest(home: Path) -> None:
    entries = [(path.stat(), path) for path in home.glob("*/*-cache")]
    entries.sort(key=lambda entry: entry[0].st_atime)
    excess = sum(about.st_size for about, _ in entries) - MOST_BYTES
    for about, path in entries:
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= about.st_size
