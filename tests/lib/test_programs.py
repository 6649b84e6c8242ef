"""Compiled programs kept between processes: used again, and only on the machine that made them."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from lib.runs import _programs, keep_compiled_programs

SCRIPT = """
import sys, jax
from lib.runs import _programs
machine = _programs._machine_and_versions()
_programs._machine_and_versions = lambda: [*machine, *sys.argv[1:]]
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
_programs.keep_compiled_programs()
assert jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))[0, 0] == 4
print(events.count("/jax/compilation_cache/cache_hits"))
"""


def test_the_second_process_compiles_nothing_and_another_machine_everything(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def hits(*more):
        command = [sys.executable, "-c", SCRIPT, *more]
        return int(subprocess.check_output(command, env=environment, text=True))

    assert hits() == 0
    assert hits() > 0
    assert hits("avx1024") == 0
    assert hits("jax 99") == 0


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No cache is in use, and none stays so."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def entry(folder: Path, name: str, content: bytes, age: float = 0) -> Path:
    path = folder / f"{name}-cache"
    path.write_bytes(content)
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


def test_what_was_cut_short_is_dropped(home):
    folder = keep_compiled_programs()
    whole = zlib.compress(b"program")
    kept, *cut = (entry(folder, str(n), whole[:n]) for n in (len(whole), 5, 0))
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_compiled_programs() == folder
    assert kept.exists()
    assert not any(path.exists() for path in cut)


def test_beyond_the_bound_what_was_not_used_for_longest_goes(home, monkeypatch):
    folder = keep_compiled_programs()
    content = zlib.compress(os.urandom(1000))
    old, new = entry(folder, "old", content, age=9e5), entry(folder, "new", content, age=9e4)
    monkeypatch.setattr(_programs, "MOST_BYTES", 1500)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_of_the_users_own_and_one_that_cannot_be_made_are_left_alone(home):
    jax.config.update("jax_compilation_cache_dir", "mine")
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir == "mine"
    jax.config.update("jax_compilation_cache_dir", None)
    (home / "kernel-flows").write_text("a file in the way")
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
