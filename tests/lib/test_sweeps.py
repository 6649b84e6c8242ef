"""Sweeps: what is missing runs once, whatever ends badly is told and runs again, signals arrive.

The commands are scripts that write down each start of theirs. Slurm is a folder of scripts that do
what sbatch and srun do on one machine, and write down what the others are asked.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from submitit.slurm.slurm import SlurmJob

from lib.runs import _workers, sweeps
from lib.runs._locks import FolderBusyError, lock_folder

ROOT = Path(__file__).parents[2]

JOB = """
import os, signal, sys, time
from pathlib import Path

name, here = sys.argv[1], Path(__file__).parent

def note(text):
    with open(here / name, "a") as file:
        file.write(text + "\\n")

def stop(number, frame):
    note("SIGINT" if number == signal.SIGINT else "SIGTERM")
    print("saved")
    sys.exit(130)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
note(f"started by {os.getppid()}")
print("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
if not (here / "all is well").exists():
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "wrong":
        sys.exit("ValueError: no such thing")
    if name == "orphan":
        os.kill(os.getppid(), signal.SIGKILL)
    if name.startswith("long") or name == "orphan":
        for _ in range(600):
            time.sleep(0.1)
            if (here / "all is well").exists():
                break
"""


@pytest.fixture
def job(tmp_path):
    """A script that does what its name says, until all is well."""
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def run(job, *names, **options):
    """The exit status of a sweep over the names."""
    arguments = sweeps.Arguments(
        grid=(f"name={','.join(names)}",), results=job.parent / "results", **options
    )
    return sweeps.main(arguments, ["python", str(job), "{name}"])


def notes(job, name):
    path = job.with_name(name)
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def folder_of(job, name):
    (log,) = [
        log
        for log in (job.parent / "results/sweeps").glob("*/log.txt")
        if log.read_text().split("\n")[0].endswith(f"/job.py {name}")
    ]
    return log.parent


# The grid


def test_a_grid_is_every_combination_in_order():
    template = ["a.py", "--seed", "{seed}", "--name={lr}_{seed}", "{not a place}", "{}"]
    commands = _workers.expand(template, ["seed=0,1", "lr=.1,{seed},x=y"])
    rest = ("{not a place}", "{}")
    assert commands == [
        ("a.py", "--seed", "0", "--name=.1_0", *rest),
        ("a.py", "--seed", "0", "--name={seed}_0", *rest),
        ("a.py", "--seed", "0", "--name=x=y_0", *rest),
        ("a.py", "--seed", "1", "--name=.1_1", *rest),
        ("a.py", "--seed", "1", "--name={seed}_1", *rest),
        ("a.py", "--seed", "1", "--name=x=y_1", *rest),
    ]
    assert _workers.expand(["a.py"], []) == [("a.py",)]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        *(([grid], f"not of '{grid}'") for grid in ("seed", "seed=", "seed=1,,2", "=1", "se-ed=1")),
        (["seed=1,2,1"], "'seed=1,2,1' holds a name or a value for the second time"),
        (["seed=1", "seed=2"], "'seed=2' holds a name or a value for the second time"),
        (["seed=1", "lr=2"], "lr is in the grid and not in the command"),
        ([], "seed is in the command and not in the grid"),
    ],
)
def test_bad_grids_are_one_clear_error(grid, message):
    with pytest.raises(ValueError, match=message) as error:
        _workers.expand(["a.py", "{seed}"], grid)
    assert len(str(error.value).splitlines()) == 1


def test_bad_options_are_refused_before_anything_starts(job):
    for options, message in (
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"detach": True}, "--detach is for --slurm"),
        ({"slurm": ("partition=long",)}, "time limit in minutes"),
        ({"slurm": ("time=2:00:00",)}, "time limit in minutes"),
    ):
        with pytest.raises(ValueError, match=message):
            run(job, "good", **options)
    with pytest.raises(ValueError, match="give the command after --"):
        sweeps.main(sweeps.Arguments(), ["python"])
    assert not notes(job, "good")
    assert not (job.parent / "results").exists()


# Here


def test_what_ends_badly_is_told_and_runs_again_alone(job, capsys, monkeypatch):
    names = ["good", "killed", "wrong", "orphan"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert run(job, *names, workers=2) == 1
    starts = {name: 2 if name in ("killed", "wrong", "orphan") else 1 for name in names}
    assert all(len(notes(job, name)) == 1 for name in names)
    out = capsys.readouterr().out
    table = out[out.index("1 of 4 finished") :].splitlines()
    ends = {
        "killed": ("killed by signal 9 (Killed)", "CUDA_VISIBLE_DEVICES 7"),
        "wrong": ("exit status 1", "ValueError: no such thing"),
        "orphan": ("worker died", "CUDA_VISIBLE_DEVICES 7"),
    }
    for k, (name, (what, last)) in enumerate(ends.items()):
        command, how, log = table[1 + 3 * k : 4 + 3 * k]
        assert command == f"  python {job} {name}"
        assert how.strip() == what
        assert log.strip() == f"{folder_of(job, name) / 'log.txt'}: {last}"
    assert table[10:] == ["the same sweep again runs what is missing"]

    # The command whose worker died goes on, and keeps its folder until it ends.
    with pytest.raises(FolderBusyError):
        lock_folder(folder_of(job, "orphan"))
    job.with_name("all is well").touch()
    lock_folder(folder_of(job, "orphan"), wait=True)

    assert run(job, *names, workers=2) == 0
    assert {name: len(notes(job, name)) for name in names} == starts
    assert capsys.readouterr().out.count("started: ") == 3
    assert run(job, *names, workers=2) == 0
    assert {name: len(notes(job, name)) for name in names} == starts
    assert capsys.readouterr().out == "4 of 4 finished already\n4 of 4 finished\n"
    done = json.loads((folder_of(job, "killed") / "done.json").read_text())
    assert done["command"] == [str(job), "killed"]
    assert done["exit_status"] == 0
    assert 0 < done["seconds"] < 60


def test_of_two_sweeps_with_a_command_in_common_one_runs_it(job, capsys):
    assert run(job, "wrong") == 1
    lock = lock_folder(folder_of(job, "wrong"))
    job.with_name("all is well").touch()
    capsys.readouterr()
    assert run(job, "wrong") == 1
    assert len(notes(job, "wrong")) == 1
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().out
    del lock


def test_a_worker_that_comes_late_finds_it_done(job, tmp_path):
    entry = _workers.Entry((str(job), "good"), tmp_path / "folder")
    entry.folder.mkdir()
    entry.done.write_text("{}")
    assert _workers.Worker({})(entry) == 0
    assert not notes(job, "good")


@pytest.mark.parametrize(
    ("visible", "workers", "shares", "memory"),
    [
        (None, 2, ["0,2", "1"], None),
        (None, 5, ["0", "1", "2", "0", "1"], "0.375"),
        ("4,6", 1, ["4,6"], None),
        ("", 2, ["", ""], None),
    ],
)
def test_workers_divide_the_gpus(monkeypatch, tmp_path, visible, workers, shares, memory):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given = _workers.gpu_shares(workers)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in given] == shares
    assert {share.get("XLA_PYTHON_CLIENT_MEM_FRACTION") for share in given} == {memory}


def test_a_dry_run_lists_and_starts_nothing(job, capsys):
    command = (str(job), "b c")
    folder = job.parent / "results/sweeps" / sweeps.runs.config_hash({"command": command})
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{}")
    before = sorted(job.parent.rglob("*"))
    assert run(job, "a", "b c", dry_run=True) == 0
    assert sorted(job.parent.rglob("*")) == before
    assert capsys.readouterr().out.splitlines() == [
        "1 of 2 finished already",
        f"to run    python {job} a",
        f"finished  python {job} 'b c'",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_what_runs_save_and_starts_nothing_more(job, number):
    """Ctrl-C goes to every process of the terminal, SIGTERM only to the sweep."""
    command = [sys.executable, "-m", "lib.runs.sweeps", "--grid", "name=long1,long2,good"]
    command += ["--workers", "2", "--results", job.parent / "results"]
    command += ["--", "python", job, "{name}"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        wait_for(lambda: notes(job, "long1") and notes(job, "long2"))
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping 2, which save first" in out
    table = out[out.index("0 of 3 finished\n  ") :]
    assert table.count("exit status 130\n") == 2
    assert table.count("log.txt: saved\n") == 2
    assert table.endswith("not started\nthe same sweep again runs what is missing\n")
    for name in ("long1", "long2"):
        assert set(notes(job, name)[1:]) == {"SIGTERM"}
    assert not notes(job, "good")


# Slurm

SLURM = {
    "srun": """
while [[ $1 == --* ]]; do
  if [[ $1 == --unbuffered ]]; then shift; else shift 2; fi
done
exec "$@"
""",
    "sbatch": """
if [[ -e $HERE/refuse ]]; then echo "invalid partition" >&2; exit 1; fi
cp "$1" "$HERE/script"
echo "Submitted batch job $$"
if [[ -e $HERE/hold ]]; then exit; fi
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
export SLURM_JOB_ID=$$ CUDA_VISIBLE_DEVICES=3
for task in $(seq 0 "${last:-0}"); do
  if [[ $last ]]; then export SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID=$task; fi
  bash "$1" >>"$HERE/output" 2>&1 &
done
""",
    "sacct": 'echo "JobID|State|NodeList"; sed "s/$/|NODE_FAIL|node1/" "$HERE/lost" 2>/dev/null',
    "scancel": 'echo "scancel $*" >>"$HERE/calls"',
    "scontrol": 'echo "scontrol $*" >>"$HERE/calls"',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of a Slurm of one machine."""
    here = tmp_path / "slurm"
    here.mkdir()
    for name, text in SLURM.items():
        (here / name).write_text(f"#!/usr/bin/env bash\nHERE={here}\n{text}\n")
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.setattr(_workers, "_SLURM_LOOK", 0.1)
    monkeypatch.setattr(SlurmJob, "_results_timeout_s", 1)
    return here


def test_slurm_gets_its_options_and_runs_the_workers(job, slurm, capsys):
    options = ("time=30", "gpus=1", "partition=long", "--mem-per-cpu=4G", "exclusive")
    assert run(job, "good", "wrong", slurm=options, workers=1) == 1
    lines = (slurm / "script").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    wanted = {"time=30", "gpus=1", "partition=long", "mem-per-cpu=4G", "exclusive", "array=0-1%1"}
    assert wanted <= set(asked)
    assert "job-name=sweep" in asked
    assert len({line.split("=")[0] for line in asked}) == len(asked)
    out = capsys.readouterr().out
    assert "1 of 2 finished\n" in out
    assert "exit status 1\n" in out
    assert "CUDA_VISIBLE_DEVICES 3\n" in (folder_of(job, "good") / "log.txt").read_text()
    assert (folder_of(job, "good") / "done.json").exists()


def test_a_job_that_slurm_warns_saves_goes_back_into_the_queue_and_resumes(job, slurm, capsys):
    assert run(job, "long", slurm=("time=30",), detach=True) == 0
    number = capsys.readouterr().out.rpartition("(job ")[2].split(",")[0]
    wait_for(lambda: notes(job, "long"))
    worker = int(notes(job, "long")[0].removeprefix("started by "))
    os.kill(worker, signal.SIGUSR2)
    wait_for((slurm / "calls").exists)
    assert (slurm / "calls").read_text() == f"scontrol requeue {number}\n"
    assert notes(job, "long")[1:] == ["SIGTERM"]
    folder = folder_of(job, "long")
    assert not (folder / "done.json").exists()
    lock_folder(folder, wait=True)

    job.with_name("all is well").touch()
    environment = {**os.environ, "SLURM_JOB_ID": number}
    subprocess.run(["bash", slurm / "script"], env=environment, check=True, capture_output=True)
    assert len(notes(job, "long")) == 3
    assert (folder / "done.json").exists()


def test_jobs_of_a_node_that_is_lost_are_told(job, slurm, capsys, monkeypatch):
    (slurm / "hold").touch()
    submit = _workers.submit

    def submit_and_lose(*arguments, **options):
        jobs = submit(*arguments, **options)
        (slurm / "lost").write_text("".join(f"{job.job_id}\n" for job in jobs))
        return jobs

    monkeypatch.setattr(_workers, "submit", submit_and_lose)
    assert run(job, "good", "other", slurm=("time=30",)) == 1
    out = capsys.readouterr().out
    assert out.count("    worker died (NODE_FAIL)\n") == 2


def test_a_stop_cancels_the_jobs_of_slurm(job, slurm, tmp_path, capsys):
    (slurm / "hold").touch()
    entries = [_workers.Entry((str(job), name), tmp_path / "sweeps" / name) for name in "ab"]
    ended = _workers.run(entries, {"time": 30}, workers=2, stop_requested=(slurm / "script").exists)
    assert list(ended.values()) == ["cancelled", "cancelled"]
    lines = capsys.readouterr().out.splitlines()
    numbers = [line.rpartition("(job ")[2].split(",")[0] for line in lines]
    calls = (slurm / "calls").read_text().splitlines()
    assert calls == [f"scancel {number}" for number in numbers]
    assert [number.partition("_")[2] for number in numbers] == ["0", "1"]


def test_no_slurm_and_a_refusal_are_one_clear_error(job, slurm, monkeypatch):
    (slurm / "refuse").touch()
    with pytest.raises(OSError, match="no job for Slurm: invalid partition"):
        run(job, "good", slurm=("time=30",))
    monkeypatch.setenv("PATH", os.fspath(job.parent))
    with pytest.raises(OSError, match='no job for Slurm: Could not detect "srun"'):
        run(job, "good", slurm=("time=30",))


@pytest.mark.slow
def test_a_sweep_of_an_experiment_finds_it_finished(tmp_path, capsys):
    template = ["xp_dataset_distillation/condense.py", "echo", "--dataset", "digits"]
    template += ["--images_per_class", "1", "--iterations", "{steps}", "--width", "8"]
    template += ["--depth", "1", "--seed", "{seed}", "--results", str(tmp_path)]
    arguments = sweeps.Arguments(grid=("seed=0,1", "steps=20"), results=tmp_path, workers=2)
    assert sweeps.main(arguments, template) == 0
    arrays = sorted(tmp_path.rglob("arrays.npz"))
    assert [path.parent.name for path in arrays] == ["seed0", "seed1"]
    first, second = (np.load(path)["images"] for path in arrays)
    assert first.shape == second.shape
    assert not np.array_equal(first, second)
    before = [path.stat().st_mtime_ns for path in arrays]
    capsys.readouterr()
    assert sweeps.main(arguments, template) == 0
    assert capsys.readouterr().out == "2 of 2 finished already\n2 of 2 finished\n"
    assert [path.stat().st_mtime_ns for path in arrays] == before
