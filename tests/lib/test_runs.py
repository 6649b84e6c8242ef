"""Run folders: their names, their metrics, and where a result comes from."""

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chunks import metrics

from lib import runs
from lib.runs import files, settings


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 100
    bandwidths: tuple[float, ...] = (1.0, math.inf)
    inner: Inner = Inner()
    folder: Path = Path("a/b")
    seed: int = 0


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path, "xp", "flow", Config(), seed=0)


# Hashes and folders


def test_hash_ignores_field_order_excluded_fields_and_container_types():
    expected, fields = runs.config_hash(Config()), dataclasses.asdict(Config())
    assert len(expected) == 10
    assert int(expected, 16) >= 0
    assert runs.config_hash(dict(reversed(fields.items()))) == expected
    assert runs.config_hash(fields | {"bandwidths": [1.0, math.inf], "seed": 7}) == expected
    assert runs.config_hash(Config(seed=7), exclude=()) != runs.config_hash(Config(), exclude=())
    excluding = [runs.config_hash(Config(steps=n), exclude=["steps"]) for n in (1, 100)]
    assert excluding[0] == excluding[1]
    for change in (
        {"steps": 101},
        {"bandwidths": (1.0,)},
        {"bandwidths": (math.inf, 1.0)},
        {"inner": Inner(0.2)},
        {"folder": Path("a/c")},
    ):
        assert runs.config_hash(dataclasses.replace(Config(), **change)) != expected


def test_hash_is_the_same_in_another_process_and_version():
    # SHA-256 of {"a":1,"b":"x"}, from the command line's sha256sum.
    assert runs.config_hash({"b": "x", "a": 1, "seed": 5}) == "ecf9e98ec0"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kernel": lambda x: x}, "function"),
        ([1, 2], "dataclass or a mapping"),
        ({"a": {1: 2}}, "no JSON"),
    ],
)
def test_hash_rejects_what_has_no_canonical_form(config, message):
    with pytest.raises(TypeError, match=message):
        runs.config_hash(config)


def test_open_run_writes_the_configuration_and_the_environment(tmp_path, x64):
    run = runs.open_run(tmp_path, "xp", "flow", Config(), seed=4)
    digest = runs.config_hash(Config())
    assert run.folder == tmp_path / "xp" / f"flow-{digest}" / "seed4"
    config = json.loads((run.folder / "config.json").read_text())
    assert (config["seed"], config["bandwidths"]) == (4, [1.0, "Infinity"])
    assert runs.config_hash(config) == digest
    environment = json.loads((run.folder / "env.json").read_text())
    versions, device, here = environment["versions"], environment["device"], jax.devices()[0]
    assert (versions["jax"], versions["numpy"]) == (jax.__version__, np.__version__)
    assert (device["platform"], device["kind"]) == (here.platform, here.device_kind)
    assert environment["cpu"]["cores"] >= 1
    assert environment["cpu"]["model"]
    assert environment["x64"] is True
    assert time.strptime(environment["time"][:10], "%Y-%m-%d")


def test_provenance_says_commit_device_seeds_and_command(tmp_path):
    cpu = {"model": "AMD EPYC", "cores": 2}
    environment = {
        "time": "2025-01-02T03:04:05+00:00",
        "command": "python run.py --seeds 0 1",
        "commit": "0123456789abcdef",
        "dirty": True,
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "cpu": cpu,
    }
    path = tmp_path / "rings_paper.json"
    files.write_json(path, {"seeds": [0, 1], "environment": environment})
    assert runs.provenance(path) == (
        "`rings_paper.json`: commit `0123456` and changes; AMD EPYC, 2 cores; seeds 0, 1; "
        "2025-01-02; `python run.py --seeds 0 1`"
    )
    gpu = {"platform": "gpu", "kind": "NVIDIA H100", "count": 4}
    elsewhere = environment | {"commit": None, "dirty": None, "device": gpu}
    files.write_json(path, {"environment": elsewhere})
    assert ": no commit; 4 x NVIDIA H100; 2025-01-02; `python" in runs.provenance(path)


def test_every_committed_summary_says_where_it_comes_from():
    for path in Path(__file__).parents[2].glob("xp_*/published/*.json"):
        assert re.match(rf"`{path.name}`: commit `\w{{7}}`", runs.provenance(path)), path


def test_reopening_keeps_what_is_there(run, tmp_path):
    def content():
        return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.folder.iterdir()}

    before = content()
    assert set(before) == {".lock", "config.json", "env.json"}
    assert runs.open_run(tmp_path, "xp", "flow", Config(), seed=0) == run
    assert content() == before


@pytest.mark.parametrize("edit", [lambda t: t.replace("100", "99"), lambda t: t[:-9]])
def test_an_edited_configuration_is_an_error_that_names_the_file(run, tmp_path, edit):
    path = run.folder / "config.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(files.RunFileError, match=r"config\.json .*edited"):
        runs.open_run(tmp_path, "xp", "flow", Config(), seed=0)


def test_finished_only_with_the_final_result(run):
    assert not run.finished
    assert run.load_checkpoint({"x": np.ones(2)}) is None
    with pytest.raises(FileNotFoundError):
        run.load_arrays()
    run.save_checkpoint({"x": np.ones(2)}, step=1)
    assert not run.finished
    run.finish(x=np.arange(3))
    np.testing.assert_array_equal(run.load_arrays()["x"], np.arange(3), strict=True)


@pytest.mark.parametrize("operations", range(5))
def test_finish_discards_what_was_saved_wherever_it_is_killed(
    run, tmp_path, monkeypatch, operations
):
    """After so many renames and deletions. Either all that it resumes from is there, or the result
    is, and nothing else as soon as the run is opened again."""
    for step in (1, 2):
        run.save_checkpoint({"x": np.ones(2)}, step=step)
    done = []

    def counted(system):
        def call(*arguments, **options):
            if len(done) == operations:
                raise KeyboardInterrupt
            done.append(arguments)
            return system(*arguments, **options)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in ("replace", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        run.finish(x=np.arange(3))
    reopened = runs.open_run(tmp_path, "xp", "flow", Config(), seed=0)
    remaining = {path.name for path in run.folder.glob("*.npz")}
    saved = {"checkpoint.npz", "checkpoint.previous.npz"}
    assert remaining == ({"arrays.npz"} if reopened.finished else saved)
    assert reopened.finished == (operations > 0)
    assert not list(run.folder.glob("*.tmp"))


# Metrics


def rows(start, stop):
    return [{"step": i, "loss": jnp.float32(1 / (i + 1)), "note": "é"} for i in range(start, stop)]


def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path):
    whole, resumed = (
        runs.open_run(tmp_path, "xp", name, Config(), seed=0) for name in ("whole", "resumed")
    )
    whole.truncate_metrics(0)
    whole.append_metrics(rows(0, 10))
    resumed.append_metrics([*rows(0, 6), {"step": 4, "loss": 0.0}])
    with open(resumed.metrics, "ab") as file:
        file.write(b'{"step": 3, "lo')
    resumed.truncate_metrics(4)
    assert [row["step"] for row in metrics(resumed)] == [0, 1, 2, 3]
    resumed.append_metrics(rows(4, 10))
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    assert [row["step"] for row in metrics(resumed)] == list(range(10))


def test_every_torn_last_line_is_dropped(run):
    run.truncate_metrics(0)
    assert not run.metrics.exists()
    run.append_metrics(rows(0, 2))
    before = run.metrics.stat()
    run.truncate_metrics(2)  # nothing to drop: nothing is written
    after = run.metrics.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    content = run.metrics.read_bytes()
    first = content.index(b"\n") + 1
    for size in range(first, len(content)):
        run.metrics.write_bytes(content[:size])
        run.truncate_metrics(5)
        assert run.metrics.read_bytes() == content[:first]


def test_not_finite_values_are_valid_json(run):
    losses = np.array([np.nan, np.inf, -np.inf, 1.5], np.float32)
    run.append_metrics([{"step": np.int64(0), "loss": jnp.float32(np.nan), "losses": losses}])

    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads(run.metrics.read_text(), parse_constant=reject)
    assert stored == {"step": 0, "loss": "NaN", "losses": ["NaN", "Infinity", "-Infinity", 1.5]}


def test_bad_rows_are_refused_and_broken_lines_named(run):
    run.append_metrics(rows(0, 1))
    before = run.metrics.read_bytes()
    for bad in ({"loss": 1.0}, {"step": 1.5}, {"step": None}):
        with pytest.raises(ValueError, match="integer"):
            run.append_metrics([*rows(1, 2), bad])
    assert run.metrics.read_bytes() == before
    for line in (b"nonsense", b"[1]", b'{"loss": 1}', b'{"step": "x"}'):
        run.metrics.write_bytes(before + line + b"\n" + before)
        with pytest.raises(files.RunFileError, match=r"metrics\.jsonl, line 2"):
            run.truncate_metrics(9)


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        environment = runs.environment()
        return environment["commit"], environment["dirty"]

    monkeypatch.setattr("lib.runs._folders.__file__", str(tmp_path / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == (None, None)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "start")
    assert commit() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "new.py").write_text("")
    assert commit() == (git("rev-parse", "HEAD"), True)


# Checks of settings, and choices among names


@dataclasses.dataclass(frozen=True)
class Numbers:
    size: int = 1
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Arguments(Numbers):
    seed: int = 0


@pytest.mark.parametrize(
    ("check", "good", "bad", "said"),
    [
        (settings.check_sizes, (1, 7), (0, -1, float("nan")), "at least 1"),
        (settings.check_positive, (1e-9, 3.0), (0.0, -1.0, float("inf"), float("nan")), "positive"),
        (settings.check_not_negative, (0.0, 3.0), (-1.0, float("inf"), float("nan")), "at least 0"),
    ],
)
def test_checks_name_the_field_and_its_value(check, good, bad, said):
    for value in good:
        check(Numbers(rate=value), "rate", "size")
    for value in bad:
        with pytest.raises(ValueError, match=f"rate must be {said}.*got {value}"):
            check(Numbers(rate=value), "size", "rate")


def test_a_commands_arguments_hold_its_settings():
    numbers = settings.settings_of(Numbers, Arguments(size=3, rate=0.25, seed=9))
    assert type(numbers) is Numbers
    assert numbers == Numbers(3, 0.25)


def test_names_that_are_chosen():
    there = {"b": 1, "a": 2}
    assert settings.chosen((), there, kind="group") == ("b", "a")
    assert settings.chosen(("a",), there, kind="group") == ("a",)
    with pytest.raises(ValueError, match="no group 'x', 'y'; there are 'b', 'a'"):
        settings.chosen(("y", "a", "x"), there, kind="group")
