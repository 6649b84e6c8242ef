"""Locks of run folders: one process at a time, none left behind by the dead."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading

import pytest

from lib.runs import _locks as locks
from lib.runs._locks import FolderBusyError, lock_folder

HOLDER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("locks", sys.argv[1])
locks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locks)
lock = locks.lock_folder(sys.argv[2])
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder until a line comes; only the module, without jax."""
    command = [sys.executable, "-c", HOLDER, locks.__file__, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_another_process_is_kept_out_and_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(FolderBusyError) as error:
        lock_folder(tmp_path)
    (line,) = str(error.value).splitlines()
    assert str(tmp_path) in line
    assert f"process {holder.pid} on {os.uname().nodename}" in line


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.kill()
    assert holder.wait(timeout=60) == -signal.SIGKILL
    lock = lock_folder(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    del lock


def test_waiting_ends_when_the_holder_does(tmp_path, holder, capfd):
    held = []
    thread = threading.Thread(target=lambda: held.append(lock_folder(tmp_path, wait=True)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert not held
    holder.communicate(b"\n", timeout=60)
    thread.join(60)
    assert len(held) == 1
    assert f"waiting for process {holder.pid}" in capfd.readouterr().err


def other_process_gets_it(folder):
    command = [sys.executable, "-c", HOLDER, locks.__file__, str(folder)]
    return subprocess.run(command, input=b"\n", capture_output=True, timeout=60).returncode == 0


def failing(number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    return fails


def test_a_process_may_lock_twice_and_lets_go_with_the_last(tmp_path):
    first = lock_folder(tmp_path)
    second = lock_folder(tmp_path / ".." / tmp_path.name)
    assert first is second
    del first
    gc.collect()
    assert not other_process_gets_it(tmp_path)
    del second
    gc.collect()
    assert other_process_gets_it(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_named_and_do_not_stop_a_run(
    tmp_path, monkeypatch, capsys, number
):
    monkeypatch.setattr(locks.fcntl, "flock", failing(number))
    assert lock_folder(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line
    assert "no locks" in line


def test_a_full_disk_does_not_stop_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    assert lock_folder(tmp_path)
