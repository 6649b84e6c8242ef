"""Two processes, connected by jax.distributed over loopback, do what one does; the first writes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from chunks import metrics

from lib.runs import Run, processes
from lib.runs.files import load_arrays

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(*command, **options) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the time is compiling
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def ended(process: subprocess.Popen, seconds: float = 400) -> str:
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors[-3000:]
    return output


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(results folder, what each process found, what it printed) of one process and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    script, address = Path(__file__).with_name("on_two_processes.py"), f"127.0.0.1:{free_port()}"
    processes = [start(script, one), *(start(script, two, address, i) for i in range(2))]
    printed = [ended(process) for process in processes]
    files = one / "found-0.npz", two / "found-0.npz", two / "found-1.npz"
    return two, [dict(np.load(file)) for file in files], printed


@pytest.mark.slow
def test_two_processes_find_what_one_finds(found):
    _, (one, first, second), _ = found
    assert {"losses", "particles", "log_likelihoods", "means", "parameters0"} <= one.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        tolerance = 1e-5 if value.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(first[name], value, tolerance, tolerance, err_msg=name)
    np.testing.assert_array_equal(first["gathered"], [np.arange(3.0) + i / 3 for i in range(5)])


@pytest.mark.slow
def test_a_stop_asked_of_one_process_stops_both_and_resumes_to_the_same_bits(found):
    _, (_, first, _), printed = found
    assert "stopped on request after step 5" in printed[1]
    np.testing.assert_array_equal(first["resumed"], first["particles"])


@pytest.mark.slow
def test_the_first_process_alone_writes_and_prints(found):
    folder, _, printed = found
    assert "done" in printed[1]
    assert "done" not in printed[2]
    (stopped,) = folder.glob("test/stopped-*/seed0")
    # Every step is a chunk.
    assert [row["step"] for row in metrics(Run(stopped))] == list(range(40))
    assert json.loads((stopped / "config.json").read_text()) == {"seed": 0}
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_other_ends_and_says_so(tmp_path, victim):
    address = f"127.0.0.1:{free_port()}"
    command = (
        "xp_drmmd/run.py", "--step_num", "2000000", "--records", "2", "--results", tmp_path,
        "--coordinator", address, "--num_processes", "2", "--process_id",
    )  # fmt: skip
    said = [tmp_path / f"stderr{i}" for i in range(2)]
    processes = []
    try:
        for i in range(2):
            with open(said[i], "w") as stderr:
                processes.append(start(*command, i, stdout=subprocess.DEVNULL, stderr=stderr))
        deadline = time.monotonic() + 300
        while "loss=" not in said[0].read_text() and time.monotonic() < deadline:
            time.sleep(0.5)  # until they are in the compiled loop
        processes[victim].kill()
        processes[1 - victim].wait(timeout=100)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # Where the first died, JAX's client, which has lost its coordinator, may abort us before Python
    # hears of the failed collective.
    aborted = victim == 0 and processes[1].returncode == -signal.SIGABRT
    assert processes[1 - victim].returncode == 1 or aborted
    assert aborted or "A process of this command has died" in said[1 - victim].read_text()


# Every experiment as a command


COMMANDS = {
    "condense": (
        "xp_dataset_distillation/condense.py", "echo", "--dataset", "digits", "--width", "8",
        "--depth", "2", "--iterations", "4", "--real_batch", "16", "--num_per_class", "40",
    ),
    "drmmd": (
        "xp_drmmd/run.py", "--step_num", "100", "--records", "4", "--source_particle_num", "64",
    ),
    "image flow": (
        "xp_transfer_learning/image_flow.py", "--src_dataset", "digits",
        "--tgt_dataset", "digits:rotated", "--num_per_class", "10", "--n_epochs", "20",
    ),
    "flow matching": (
        "xp_gmm_source/flow.py", "--dataset", "digits", "--num_steps", "6", "--width", "8",
        "--batch_size", "16", "--num_samples", "50",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_on_two_processes(tmp_path, name):
    """Figures and all: the arrays of the run are those of one process, to rounding."""
    address = f"127.0.0.1:{free_port()}"
    processes = [start(*COMMANDS[name], "--results", tmp_path / "one")]
    for i in range(2):
        where = ("--coordinator", address, "--num_processes", "2", "--process_id", i)
        processes.append(start(*COMMANDS[name], "--results", tmp_path / "two", *where))
    for process in processes:
        ended(process, 900)
    compared = 0
    for path in (tmp_path / "one").rglob("arrays.npz"):
        one = load_arrays(path)
        two = load_arrays(tmp_path / "two" / path.relative_to(tmp_path / "one"))
        for key in {"images", "particles", "losses"} & one.keys():
            scale = np.abs(one[key]).max()
            np.testing.assert_allclose(two[key], one[key], rtol=0, atol=1e-3 * scale)
            compared += 1
    assert compared
    pictures = [sorted(p.name for p in (tmp_path / n).rglob("*.png")) for n in ("one", "two")]
    assert pictures[0] == pictures[1]


# One process: what needs no second


def test_one_process_agrees_with_itself():
    assert processes.agreed(5, True, False) == (5, True, False)
    assert processes.is_first()
    assert list(processes.own_share(3)) == [0, 1, 2]
    np.testing.assert_array_equal(
        processes.gathered([np.ones(2), np.zeros(2)], 2), [[1, 1], [0, 0]]
    )
    with processes.first_alone("here") as first, processes.first_alone("and here") as again:
        assert first
        assert again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "--devices 0"),
        ({"num_processes": 2}, "need --coordinator"),
        ({"coordinator": "a:1"}, "needs --num_processes"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "got 2 and 2"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 0, "devices": 3}, "3 cannot be"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_starts(options, message):
    with (
        pytest.raises(ValueError, match=message),
        processes.started(processes.DeviceOptions(**options)),
    ):
        pass


def test_one_device_is_taken_unless_more_are_asked_for():
    """The other GPUs are not opened."""
    before = jax.config.values["jax_cuda_visible_devices"]
    try:
        with processes.started(processes.DeviceOptions()) as mesh:
            assert mesh is None
            assert jax.config.values["jax_cuda_visible_devices"] == "0"
    finally:
        jax.config.update("jax_cuda_visible_devices", before)


def test_the_environment_names_the_coordinator(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="--process_id below it, got 2 and None"):  # noqa: SIM117
        with processes.started(processes.DeviceOptions()):
            pass
