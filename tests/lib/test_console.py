"""Stops on request, progress, and errors in one line."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from scripts import REPOSITORY

from lib.runs import commands, console, processes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_stop(number):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    done = 0

    def loop():
        nonlocal done
        with console.interruptible() as stop_requested:
            assert not stop_requested()
            for step in range(1, 5):
                if step == 2:
                    os.kill(os.getpid(), number)
                done = step
                if stop_requested():
                    raise console.Interrupted("folder/checkpoint.npz", step)

    with pytest.raises(console.Interrupted) as error:
        loop()
    assert done == 2
    assert isinstance(error.value, KeyboardInterrupt)
    assert "folder/checkpoint.npz" in str(error.value)
    assert "step 2" in str(error.value)
    assert "resume" in str(error.value)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_interrupt_raises_at_once():
    before = signal.getsignal(signal.SIGINT)
    passed = []
    with pytest.raises(KeyboardInterrupt) as error, console.interruptible():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        passed.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        passed.append("second")
    assert passed == ["first"]
    assert not isinstance(error.value, console.Interrupted)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_unanswered_request_is_passed_outwards_and_delivered_after_the_block():
    passed = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with console.interruptible() as outer:
            with console.interruptible() as inner:
                os.kill(os.getpid(), signal.SIGINT)
                assert inner()
                assert not outer()
            assert outer()
            passed.append("inside")
        passed.append("after")
    assert passed == ["inside"]


def test_handlers_are_restored_after_an_error_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(ZeroDivisionError), console.interruptible() as stop_requested:  # noqa: PT012
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            assert not stop_requested()
            1 / 0  # noqa: B018
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_off_the_main_thread_nothing_happens():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def body():
        with console.interruptible() as stop_requested:
            seen.append((stop_requested(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Unreadable:
    def __float__(self):
        raise AssertionError("converted although nothing is shown")


def test_a_terminal_shows_a_bar_with_the_loss(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress(10, initial=4, description="flow") as advance:
        advance(3, loss=jnp.float32(0.5))
        advance(3, loss=jnp.float32(0.25))
    last = sys.stderr.getvalue().split("\r")[-1]
    assert last.startswith("flow: 100%")
    assert "10/10" in last
    assert "loss=0.25" in last


@pytest.mark.parametrize("line_every", [None, 10.0])
def test_no_terminal_or_not_enabled_is_silent(capsys, line_every):
    enabled = line_every is None
    with console.progress(
        10, description="flow", enabled=enabled, line_every=line_every
    ) as advance:
        advance(10, loss=Unreadable())
    assert capsys.readouterr() == ("", "")


def test_log_files_get_a_line_now_and_then(capsys):
    with console.progress(100, description="flow", line_every=0.2) as advance:
        for _ in range(100):
            time.sleep(0.005)
            advance(1, loss=0.5)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert "\r" not in captured.err
    assert 3 <= len(lines) <= 8
    assert all(line.startswith("flow: ") for line in lines)
    assert "100/100" in lines[-1]
    assert "loss=0.5" in lines[-1]


def test_one_line_errors_name_the_kind_and_leave_the_status(capsys):
    for error, status in [(ValueError("lr is -1"), 1), (console.Interrupted("here", 3), 130)]:
        with pytest.raises(SystemExit) as stopped, console.one_line_errors():
            raise error
        assert stopped.value.code == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"{type(error).__name__}: {error}"
    for error in (
        KeyError("a fault of our own keeps its traceback"),
        RuntimeError("beside devices that are there"),
        AssertionError(),
        jax.errors.JaxRuntimeError("INTERNAL: a fault"),
    ):
        with pytest.raises(type(error)), console.one_line_errors(lower="--block_size"):
            raise error


def test_a_command_stopped_before_its_first_step_ends_in_one_line(capsys):
    def main(arguments, mesh):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit) as stopped:
        commands.run_command(main, processes.DeviceOptions)
    assert stopped.value.code == console.STATUS_OF_A_STOP
    (line,) = capsys.readouterr().err.splitlines()
    assert "the same command goes on" in line


COMMAND = (
    "from lib.runs import commands, processes; commands.run_command(print, processes.DeviceOptions)"
)


@pytest.mark.parametrize("platforms", ["cuda", "nonsense,cpu"])
def test_platforms_that_are_not_there_are_one_line(platforms):
    """JAX itself raises an AssertionError without text, or explains in a traceback."""
    environment = {**os.environ, "JAX_PLATFORMS": platforms, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env=environment,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    if done.returncode == 0:
        pytest.skip("this machine has them")
    line = done.stderr.splitlines()[-1]  # JAX may log what its plugins say
    assert line.startswith(f"JAX_PLATFORMS={platforms}: JAX finds no such device here, only ")
    assert "Unset it, set JAX_PLATFORMS=" in line
    assert "Traceback" not in done.stderr


def test_scripts_start_in_a_clone_that_changes_line_ends(tmp_path):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no clone of a git repository")
    git = ["git", "-c", "core.autocrlf=true"]
    subprocess.run([*git, "clone", "--quiet", "--no-checkout", REPOSITORY, tmp_path], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "*.sh", ".ci/run"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    scripts = listed.stdout.split()
    subprocess.run(
        [*git, "checkout", "--quiet", "HEAD", "--", ".gitattributes", "README.md", *scripts],
        cwd=tmp_path,
        check=True,
    )
    assert b"\r\n" in (tmp_path / "README.md").read_bytes()
    assert not [name for name in scripts if b"\r" in (tmp_path / name).read_bytes()]
    helped = subprocess.run(
        ["bash", "run.sh", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "xp_drmmd" in helped.stdout
