"""Compiled programs are kept from one command to the next: JAX's persistent compilation cache."""

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import platform
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

MOST_BYTES = 200 * 2**20  # about 20,000 programs
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")


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
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kernel-flows")
    about = _machine_and_versions()
    folder = home / hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_damaged(folder)
        _drop_oldest(home)
    except OSError:
        return None
    quiet = "JAX_LOGGING_LEVEL" not in os.environ and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1"
    if quiet and not any("plugin" in line for line in about):
        # XLA takes "prefer-no-gather", which it compiles for on some processors, for a feature that
        # they lack, and says so at length for every program that it loads. So nothing of its C++
        # below fatal errors is printed, unless the environment asks for another level than JAX's
        # own, 1. Errors are raised all the same.
        jax.config.update("jax_logging_level", "CRITICAL")
        jax.config.update("jax_logging_level", None)  # of Python's loggers, which stay as they are
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Also those that compile in no time: a command has dozens, and reads one in a few milliseconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _machine_and_versions() -> list[str]:
    told = [line for line in first_core() if line.startswith(("model name", "flags", "Features"))]
    installed = [f"{package} {version}" for package, version in versions(PACKAGES).items()]
    return [platform.machine(), platform.processor(), *told, *installed]


def first_core() -> list[str]:
    """The lines that Linux has on the first of this machine's cores; none elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return []


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those of the packages that are installed."""
    installed = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def _drop_damaged(folder: Path) -> None:
    """Entries that a full disk or a kill cut short, of which JAX would warn at every start."""
    stamp = folder / "checked"  # modified at the last look at new entries
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.touch()
    for entry in folder.glob("*-cache"):
        if entry.stat().st_mtime >= since - 1 and not _whole(entry.read_bytes()):
            entry.unlink(missing_ok=True)  # another process may have been here


def _whole(content: bytes) -> bool:
    """JAX compresses by zstandard where that is installed, else by zlib."""
    with contextlib.suppress(Exception):
        if content.startswith(b"\x28\xb5\x2f\xfd"):
            importlib.import_module("zstandard").ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
        return True
    return False


def _drop_oldest(home: Path) -> None:
    entries = [(path.stat(), path) for path in home.glob("*/*-cache")]
    excess = sum(about.st_size for about, _ in entries) - MOST_BYTES
    for about, path in sorted(entries, key=lambda entry: entry[0].st_atime):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= about.st_size
