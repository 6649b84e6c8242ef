"""What dies, fills up or is damaged: nothing is lost, and one line says what happened."""

import dataclasses
import errno
import io
import itertools
import os
import re
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm.std
from chunks import assert_same_bits, metrics
from stored import CONDENSED, MIXTURE

from lib import gd, runs
from lib.report import page, plotting
from lib.runs import commands, console, files, processes
from xp_data_mixing.embedding_files import write_embeddings
from xp_dataset_distillation import export
from xp_gmm_source import gmm_files

LIKE = {"x": np.zeros(50_000)}


def state(step):
    return {"x": np.full(50_000, float(step))}


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path, "xp", "flow", {"steps": 3}, seed=0)


# Two processes in one folder

OTHER = """
import sys
from lib import runs
from lib.runs import console

with console.one_line_errors():
    print(runs.open_run(sys.argv[1], "xp", "flow", {"steps": 3}, seed=0).finished)
"""


def other(folder):
    command = [sys.executable, "-c", OTHER, str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_second_process_is_refused_until_the_run_is_finished(tmp_path, run):
    temporary = run.folder / ".checkpoint.npz.1a2b3c4d.tmp"
    temporary.write_bytes(b"being written")
    refused = other(tmp_path)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("FolderBusyError: ")
    assert str(run.folder) in line
    assert f"process {os.getpid()} on " in line
    assert temporary.exists()  # a live writer's file is not a leftover
    run.finish(x=np.ones(2))
    read = other(tmp_path)
    assert (read.returncode, read.stdout) == (0, "True\n"), read.stderr


def test_a_killed_export_is_cleaned_up(tmp_path, run):
    """A folder under a temporary name, as the export of condensed sets leaves it when killed."""
    leftover = run.folder / ".condensed.1a2b3c4d.tmp"
    (leftover / "images").mkdir(parents=True)
    (leftover / "images" / "0.png").write_bytes(b"half")
    runs.open_run(tmp_path, "xp", "flow", {"steps": 3}, seed=0)
    assert not leftover.exists()


# A full disk, a folder that cannot be written


def only_line(capsys, call):
    """What a command ends in that `call` stops."""
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def fail(number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    return fails


def half_written(monkeypatch):
    """The disk is full after 1,000 bytes of an array, as for everything written after them."""

    def write_array(file, array, **_):
        file.write(array.tobytes()[:1000])
        fail(errno.ENOSPC)()

    monkeypatch.setattr(np.lib.format, "write_array", write_array)


FULL = {
    "half way": half_written,
    "at fsync": lambda patch: patch.setattr(os, "fsync", fail(errno.ENOSPC)),
    "at rename": lambda patch: patch.setattr(os, "replace", fail(errno.EDQUOT)),
}


@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_leaves_the_checkpoints_and_no_temporary_file(run, monkeypatch, moment):
    for step in (1, 2):
        run.save_checkpoint(state(step), step=step)
    before = sorted(run.folder.iterdir())
    with monkeypatch.context() as patch:
        FULL[moment](patch)
        with pytest.raises(OSError, match=r"No space|quota") as error:
            run.save_checkpoint(state(3), step=3)
    (line,) = str(error.value).splitlines()
    assert str(run.checkpoint) in line
    assert sorted(run.folder.iterdir()) == before
    loaded, step = run.load_checkpoint(LIKE)
    assert step == 2
    assert np.all(loaded["x"] == 2)
    run.save_checkpoint(state(3), step=3)
    assert run.load_checkpoint(LIKE)[1] == 3


def test_a_full_disk_in_a_command_is_one_line(run, monkeypatch, capsys):
    FULL["half way"](monkeypatch)
    line = only_line(capsys, console.one_line_errors()(lambda: run.finish(x=np.ones(3))))
    assert str(run.arrays) in line
    assert "No space left on device" in line
    assert not run.finished


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_embeddings_on_a_full_disk_are_named_and_leave_nothing(small_disk, suffix):
    """Of a .pt 160 KB fit, but not twice: torch meets the end of the disk, not the rows' file."""
    path = small_disk / f"a.{suffix}"
    for num in (2500, 6000) if suffix == "pt" else (6000,):
        with pytest.raises(OSError, match=rf"No space left.*{path}"):
            write_embeddings(path, iter([np.ones((num, 16), np.float32)]))
        assert os.listdir(small_disk) == []


def test_figures_and_condensed_sets_on_a_full_disk_are_named(tmp_path, monkeypatch):
    figure, _ = plotting.plt.subplots()
    monkeypatch.setattr(type(figure), "savefig", fail(errno.ENOSPC))
    with pytest.raises(OSError, match=rf"No space left.*{tmp_path / 'a.png'}"):
        plotting.save_figure(figure, tmp_path / "a.png")
    monkeypatch.setattr(export.Image.Image, "save", fail(errno.ENOSPC))
    with pytest.raises(OSError, match=rf"No space left.*{tmp_path / 'set'}"):
        export.save(tmp_path / "set", CONDENSED)
    assert os.listdir(tmp_path) == []


def test_metrics_are_appended_whole_or_not_at_all(run, monkeypatch):
    run.append_metrics([{"step": 0}])
    before = run.metrics.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(errno.ENOSPC))
        with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
            run.append_metrics([{"step": 1}, {"step": 2}])
    assert run.metrics.read_bytes() == before
    run.append_metrics([{"step": 1}])
    assert [row["step"] for row in metrics(run)] == [0, 1]


def test_a_read_only_folder_is_named_and_finished_runs_are_read(tmp_path, run, monkeypatch):
    """As for root, whom permissions do not stop: every opening to write fails."""

    def refusing(system_open, writes):
        def opened(path, how="r", *rest, **options):
            if writes(how):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return system_open(path, how, *rest, **options)

        return opened

    run.save_checkpoint(state(1), step=1)
    runs.open_run(tmp_path, "xp", "done", {"steps": 3}, seed=0).finish(x=np.ones(2))
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refusing(open, lambda mode: set(mode) & set("wax+")))
        to_write = os.O_WRONLY | os.O_RDWR
        patch.setattr(os, "open", refusing(os.open, lambda flags: flags & to_write))
        with pytest.raises(OSError, match=r"Read-only.*checkpoint\.npz'$"):
            run.save_checkpoint(state(2), step=2)
        with pytest.raises(OSError, match=r"Read-only.*metrics\.jsonl'$"):
            run.append_metrics([{"step": 0}])
        assert run.load_checkpoint(LIKE)[1] == 1
        again = runs.open_run(tmp_path, "xp", "done", {"steps": 3}, seed=0)
        assert again.load_arrays()["x"].sum() == 2


# Damaged checkpoints


def test_the_checkpoint_before_is_used_when_the_last_is_damaged(run, capsys):
    for step in (1, 2):
        run.save_checkpoint(state(step), step=step)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:-100])
    # Whoever only reads changes nothing.
    loaded, step = runs.Run(run.folder).load_checkpoint(LIKE)
    assert step == 1
    assert run.previous_checkpoint.exists()
    loaded, step = run.load_checkpoint(LIKE)
    assert step == 1
    assert np.all(loaded["x"] == 1)
    for line in capsys.readouterr().err.splitlines():
        assert f"{run.checkpoint} is damaged: going on from step 1" in line
    # The next save keeps the good one, not the damaged one.
    run.save_checkpoint(state(2), step=2)
    run.checkpoint.write_bytes(b"")
    assert run.load_checkpoint(LIKE)[1] == 1


def test_a_writer_killed_between_two_names_leaves_the_checkpoint_before(run, monkeypatch):
    """Where there are no hard links the old checkpoint is renamed before the new one is."""
    monkeypatch.setattr(os, "link", fail(errno.EPERM))
    for step in (1, 2):
        run.save_checkpoint(state(step), step=step)
    assert files.load_checkpoint(run.previous_checkpoint, LIKE)[1] == 1
    replace = os.replace

    def killed(source, target):
        if Path(target) == run.checkpoint:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(state(3), step=3)
    assert not run.checkpoint.exists()
    assert run.load_checkpoint(LIKE)[1] == 2


def test_two_damaged_checkpoints_are_refused(run):
    for step in (1, 2):
        run.save_checkpoint(state(step), step=step)
    for path in (run.checkpoint, run.previous_checkpoint):
        path.write_bytes(path.read_bytes()[:-100])
    both = f"{re.escape(str(run.checkpoint))}.*{re.escape(str(run.previous_checkpoint))}"
    with pytest.raises(files.DamagedFileError, match=both):
        run.load_checkpoint(LIKE)


def test_a_checkpoint_of_other_settings_is_refused_whatever_the_one_before(run):
    run.save_checkpoint(state(1), step=1)
    run.save_checkpoint({"x": np.zeros(7)}, step=2)
    with pytest.raises(files.RunFileError, match="other settings") as error:
        run.load_checkpoint(LIKE)
    assert not isinstance(error.value, files.DamagedFileError)


# Folders that are missing, or cannot be made

WRITERS = {
    "bytes": lambda path: files.write_bytes(path, b"1"),
    "JSON": lambda path: files.write_json(path, {}),
    "arrays": lambda path: files.save_arrays(path, x=np.ones(2)),
    "checkpoint": lambda path: files.save_checkpoint(path, {"x": np.ones(2)}, step=1),
    "figure": lambda path: plotting.save_figure(plotting.plt.figure(), path.with_suffix(".png")),
    "embeddings": lambda path: write_embeddings(path.with_suffix(".npy"), [np.ones((1, 2))]),
    "condensed": lambda path: export.save(path, CONDENSED),
    "mixture": lambda path: gmm_files.save(path.with_suffix(".npz"), MIXTURE),
    "page": lambda path: page.write_page(path),
    "check": lambda path: files.check_writable(path),
    "check of a folder": lambda path: files.check_writable(path, is_folder=True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_makes_its_folder_or_names_it(tmp_path, writer):
    WRITERS[writer](tmp_path / "a" / "b" / "name")
    assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"so there is no such folder.*name another: '.*/file"):
        WRITERS[writer](tmp_path / "file" / "b" / "name")


def test_a_folder_in_place_of_the_file_is_named_before_the_work(tmp_path):
    with pytest.raises(OSError, match=rf"Is a directory.*'{tmp_path}'"):
        files.check_writable(tmp_path)


@pytest.mark.parametrize("option", [*commands.OUTPUT_FOLDERS, *commands.OUTPUT_FILES])
@pytest.mark.parametrize("bases", [(), (processes.DeviceOptions,)])
def test_a_command_tries_to_write_before_it_works(tmp_path, capsys, option, bases):
    options = [(option, Path), ("unused", Path, None)]
    kind = dataclasses.make_dataclass("Options", options, bases=bases, frozen=True, kw_only=True)
    done = []

    def command(path):
        commands.run_command(lambda *given: done.append(given), lambda: kind(**{option: path}))

    command(tmp_path / "a" / "b")
    assert (tmp_path / "a").is_dir()
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in only_line(capsys, lambda: command(tmp_path / "file" / "b"))
    assert len(done) == 1


REPOSITORY = Path(__file__).parents[2]
INPUTS = {"data_root", "train_paths", "val_paths", "read", "folder", "x", "y", "add_to"}


def test_every_path_and_seed_of_a_command_is_checked():
    """Options that are paths, or seeds, are among the ones that `run_command` looks at."""
    written = {*commands.OUTPUT_FOLDERS, *commands.OUTPUT_FILES}
    for path in [*REPOSITORY.glob("xp_*/*.py"), *REPOSITORY.glob("benchmarks/*.py")]:
        text = path.read_text()
        seeds = re.findall(r"^    (\w*(?:seed|random_state)\w*): .* = ", text, re.M)
        assert {*seeds} <= {*commands.SEEDS}
        if "run_command(" in text:
            names = re.findall(r"^    (\w+): (?:tuple\[|Annotated\[)?Path\b", text, re.M)
            assert {*names} <= INPUTS | written, path
            assert {*names} - INPUTS, path
        else:
            assert "tyro.cli(" not in text or path.name == "convert.py"  # which checks by itself


# Seeds


@pytest.mark.parametrize("option", commands.SEEDS)
@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 1, int(2e21), True])
def test_a_command_refuses_what_is_no_seed_before_it_works(capsys, option, seed):
    done = []

    def command(value):
        options = types.SimpleNamespace(ntry=1, **{option: value})
        commands.run_command(done.append, lambda: options)

    for good in (0, 2**32 - 1, None):
        command(good)
    line = only_line(capsys, lambda: command((3, seed) if option == "seeds" else seed))
    assert line == (
        f"ValueError: --{option} must be a whole number from 0 to 4294967295, got {seed}: random "
        "keys hold 32 bits"
    )
    assert len(done) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": (3, 1, 3)}, "--seeds names 3 twice"),
        ({"first_seed": 2**32 - 2, "ntry": 3}, "the last of the seeds, .* got 4294967296"),
    ],
)
def test_seeds_that_are_one_or_run_out_are_refused(capsys, options, words):
    command = partial(commands.run_command, pytest.fail, lambda: types.SimpleNamespace(**options))
    assert re.search(words, only_line(capsys, command))


# Flows


def target(x, y, key):
    noise = jax.random.normal(key, x.shape)
    return jnp.mean((x - y) ** 2, axis=(1, 2)), x - y + 0.1 * noise


def flow(steps=12, **options):
    x0, y = jax.random.normal(jax.random.key(1), (2, 2, 4, 2))
    return gd.wasserstein_gradient_descent(
        x0, y, target, jax.random.key(2), steps, 0.1, 0.5, show_progress=False, **options
    )


@pytest.fixture(scope="module")
def whole():
    return flow()


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_flow_resumes_from_the_checkpoint_before_in_the_same_bits(
    run, monkeypatch, whole, size, capsys
):
    monkeypatch.setattr("lib.runs.loop.SECONDS_PER_CHUNK", 0.0)  # every step is a chunk
    flow(9, run=run, checkpoint_seconds=0.0)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:size])
    assert_same_bits(flow(run=run), whole)
    assert "going on from step 8" in capsys.readouterr().err
    assert files.load_arrays(run.checkpoint)["step"] == 12


# Clocks


def test_clocks_that_go_back_or_stand_still_change_nothing(run, monkeypatch, whole):
    now = itertools.count(1e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    monkeypatch.setattr(tqdm.std, "time", time.time)
    monkeypatch.setattr("lib.runs.loop.time", types.SimpleNamespace(monotonic=lambda: 1.0))
    assert_same_bits(flow(run=run), whole)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress(10, description="flow") as advance:
        for _ in range(10):
            advance(1, loss=0.5)
    assert "10/10" in sys.stderr.getvalue()


# Memory


@pytest.mark.parametrize(
    "work", [lambda: np.zeros(2**55), lambda: jnp.zeros(2**50, jnp.int8).block_until_ready()]
)
def test_running_out_of_memory_is_one_line_that_says_what_to_lower(work, capsys):
    line = only_line(capsys, console.one_line_errors(lower="--block_size")(work))
    assert line.startswith("Out of memory: lower --block_size, or use a machine with more (")


COMMANDS = [
    path
    for path in REPOSITORY.glob("xp_*/*.py")
    if re.search(r"run_command\([^#]*lower=", path.read_text())
]


def test_what_commands_say_to_lower_are_options_of_theirs():
    """Fields of the settings of the same experiment, read without importing it."""
    assert {path.parent.name for path in COMMANDS} == {p.name for p in REPOSITORY.glob("xp_*")}
    for path in COMMANDS:
        (call,) = re.findall(r"(?:lower=|lower = )\(?\s*((?:\"[^\"]*\"\s*)+)", path.read_text())
        names = {option or field for option, field in re.findall(r"--(\w+)|(\w+_\w+) ", call)}
        texts = [other.read_text() for other in path.parent.glob("*.py")]
        fields = {name for text in texts for name in re.findall(r"(?m)^    (\w+): ", text)}
        assert names
        assert names <= fields, path
