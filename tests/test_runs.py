"""Run folders: what is written is whole, what is read back has the same bits."""

import dataclasses
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lib import runs


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


@dataclasses.dataclass(frozen=True)
class Reordered:
    seed: int = 3
    folder: Path = Path("a/b")
    inner: Inner = Inner()
    bandwidths: tuple[float, ...] = (1.0, math.inf)
    steps: int = 100


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path, "xp", "flow", Config(), seed=0)


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# Hashes and folders


def test_hash_ignores_field_order_excluded_fields_and_container_types():
    expected = runs.config_hash(Config())
    assert len(expected) == 10
    assert int(expected, 16) >= 0
    assert runs.config_hash(Reordered()) == expected
    assert runs.config_hash(dataclasses.asdict(Config())) == expected
    assert runs.config_hash(Config(seed=7)) == expected
    assert runs.config_hash(Config(seed=7), exclude=()) != runs.config_hash(Config(), exclude=())
    assert runs.config_hash(Config(steps=1), exclude=["steps"]) == runs.config_hash(
        Config(), exclude=["steps"]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 101},
        {"bandwidths": (1.0,)},
        {"bandwidths": (math.inf, 1.0)},
        {"inner": Inner(0.2)},
        {"folder": Path("a/c")},
    ],
)
def test_hash_sees_every_other_change(change):
    assert runs.config_hash(dataclasses.replace(Config(), **change)) != runs.config_hash(Config())


def test_hash_is_the_same_in_another_process_and_version():
    # SHA-256 of {"a":1,"b":"x"}, from the command line's sha256sum.
    assert runs.config_hash({"b": "x", "a": 1, "seed": 5}) == "ecf9e98ec0"


def test_hash_rejects_what_has_no_canonical_form():
    with pytest.raises(TypeError, match="function"):
        runs.config_hash({"kernel": lambda x: x})
    with pytest.raises(TypeError, match="dataclass or a mapping"):
        runs.config_hash([1, 2])
    with pytest.raises(TypeError, match="no JSON"):
        runs.config_hash({"a": {1: 2}})


def test_open_run_writes_the_configuration_and_the_environment(tmp_path):
    run = runs.open_run(tmp_path, "xp", "flow", Config(), seed=4)
    digest = runs.config_hash(Config())
    assert run.folder == tmp_path / "xp" / f"flow-{digest}" / "seed4"
    config = json.loads((run.folder / "config.json").read_text())
    assert config["seed"] == 4
    assert config["bandwidths"] == [1.0, "Infinity"]
    assert runs.config_hash(config) == digest
    environment = json.loads((run.folder / "env.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["device"]["platform"] == jax.devices()[0].platform


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
    runs.write_json(path, {"seeds": [0, 1], "environment": environment})
    assert runs.provenance(path) == (
        "`rings_paper.json`: commit `0123456` and changes; AMD EPYC, 2 cores; seeds 0, 1; "
        "2025-01-02; `python run.py --seeds 0 1`"
    )
    gpu = {"platform": "gpu", "kind": "NVIDIA H100", "count": 4}
    elsewhere = environment | {"commit": None, "dirty": None, "device": gpu}
    runs.write_json(path, {"environment": elsewhere})
    assert ": no commit; 4 x NVIDIA H100; 2025-01-02; `python" in runs.provenance(path)


def test_every_committed_summary_says_where_it_comes_from():
    for path in Path(__file__).parents[1].glob("xp_*/published/*.json"):
        assert re.match(rf"`{path.name}`: commit `\w{{7}}`", runs.provenance(path)), path


def test_reopening_keeps_what_is_there(run, tmp_path):
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.folder.iterdir()}
    assert set(before) == {".lock", "config.json", "env.json"}
    assert runs.open_run(tmp_path, "xp", "flow", Config(), seed=0) == run
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.folder.iterdir()}
    assert after == before


@pytest.mark.parametrize("edit", [lambda t: t.replace("100", "99"), lambda t: t[:-9]])
def test_an_edited_configuration_is_an_error_that_names_the_file(run, tmp_path, edit):
    path = run.folder / "config.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(runs.RunFileError, match=r"config\.json .*edited"):
        runs.open_run(tmp_path, "xp", "flow", Config(), seed=0)


def test_finished_only_with_the_final_result(run):
    assert not run.finished
    with pytest.raises(FileNotFoundError):
        run.load_arrays()
    run.save_checkpoint({"x": np.ones(2)}, step=1)
    assert not run.finished
    run.finish(x=np.arange(3))
    assert run.finished
    assert same_bits(run.load_arrays()["x"], np.arange(3))


# Atomic writes


def test_a_failed_write_leaves_the_old_file_and_no_other(run, monkeypatch):
    run.finish(x=np.arange(3))
    names = sorted(os.listdir(run.folder))

    monkeypatch.setattr(os, "fsync", lambda number: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.finish(x=np.arange(4))
    with pytest.raises(KeyboardInterrupt):
        runs.write_json(run.folder / "config.json", {})
    config = json.loads((run.folder / "config.json").read_text())
    assert config["steps"] == 100
    assert same_bits(run.load_arrays()["x"], np.arange(3))
    assert sorted(os.listdir(run.folder)) == names


WRITER = """
import os, signal, sys
import numpy as np
from lib import runs

path, mode = sys.argv[1:]
big = np.ones(500_000)
if mode == "half":
    runs.save_checkpoint(path, {"x": 7 * big}, step=7)
    def die(file, array, **settings):
        file.write(array.tobytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    np.lib.format.write_array = die
    runs.save_checkpoint(path, {"x": 8 * big}, step=8)
step = 0
while True:
    step += 1
    runs.save_checkpoint(path, {"x": step * big}, step=step)
    if step == 2:
        print("ready", flush=True)
"""


def start_writer(path, mode):
    command = [sys.executable, "-c", WRITER, str(path), mode]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path):
    run = runs.open_run(tmp_path, "xp", "flow", Config(), seed=0)
    looping = start_writer(tmp_path / "checkpoint.npz", "loop")
    half = start_writer(run.checkpoint, "half")
    assert looping.stdout.readline() == b"ready\n"
    time.sleep(random.Random(0).uniform(0.1, 0.3))
    looping.kill()
    for process in (looping, half):
        assert process.wait(timeout=60) == -signal.SIGKILL
        process.stdout.close()

    like = {"x": np.ones(500_000)}
    state, step = runs.load_checkpoint(tmp_path / "checkpoint.npz", like)
    assert step >= 2
    assert np.all(state["x"] == step)

    # The other died with half an array written: the old file is whole, the rest is cleaned.
    state, step = run.load_checkpoint(like)
    assert step == 7
    assert np.all(state["x"] == 7)
    assert len(list(run.folder.glob(".*.tmp"))) == 1
    runs.open_run(tmp_path, "xp", "flow", Config(), seed=0)
    assert sorted(os.listdir(run.folder)) == [".lock", "checkpoint.npz", "config.json", "env.json"]


# Arrays


SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
NPY_DTYPES = ["?", "i1", "u4", "i8", "f2", "f4", ">f4", "f8", "c8", "c16"]
ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"]


@st.composite
def arrays_of_any_bits(draw):
    shape = draw(SHAPES)
    name = draw(st.sampled_from(NPY_DTYPES + ML_DTYPES))
    dtype = np.dtype(getattr(ml_dtypes, name) if name in ML_DTYPES else name)
    size = math.prod(shape) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if name == "?":
        content = bytes(byte & 1 for byte in content)
    array = np.frombuffer(bytearray(content), dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["x", "file", "path", "step", "a/b", "self", "é"]), arrays_of_any_bits()
    )
)
def test_arrays_round_trip_bit_for_bit(tmp_path_factory, arrays):
    path = tmp_path_factory.getbasetemp() / "round_trip.npz"
    runs.save_arrays(path, **arrays)
    loaded = runs.load_arrays(path)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert same_bits(loaded[name], array)
    first = path.read_bytes()
    runs.save_arrays(path, **arrays)
    assert path.read_bytes() == first


def test_nan_payloads_and_negative_zero_survive(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x00000001], np.uint32)
    runs.save_arrays(tmp_path / "a.npz", x=bits.view(np.float32), y=jnp.asarray(-0.0))
    loaded = runs.load_arrays(tmp_path / "a.npz")
    assert np.array_equal(loaded["x"].view(np.uint32), bits)
    assert np.signbit(loaded["y"])
    assert loaded["y"].shape == ()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_typed_keys_round_trip(tmp_path, impl, shape):
    key = jax.random.key(5, impl=impl)
    keys = jax.random.split(key, shape) if shape else key
    raw = jax.random.PRNGKey(5)
    runs.save_arrays(tmp_path / "a.npz", keys=keys, raw=raw)
    loaded = runs.load_arrays(tmp_path / "a.npz")
    assert loaded["keys"].dtype == keys.dtype
    assert loaded["keys"].shape == shape
    assert same_bits(jax.random.key_data(loaded["keys"]), jax.random.key_data(keys))
    assert isinstance(loaded["raw"], np.ndarray)
    assert same_bits(loaded["raw"], raw)


def test_numpy_alone_reads_plain_arrays(tmp_path):
    runs.save_arrays(tmp_path / "a.npz", x=jnp.arange(6.0).reshape(2, 3))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["x"]
        assert same_bits(loaded["x"], np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize("arrays", [{"x": np.array([None])}, {"__dtypes__": np.ones(1)}])
def test_what_cannot_be_saved_is_named(tmp_path, arrays):
    with pytest.raises(TypeError, match=next(iter(arrays))):
        runs.save_arrays(tmp_path / "a.npz", **arrays)
    assert list(tmp_path.iterdir()) == []


# Checkpoints


def example_state():
    parameters = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2, jnp.bfloat16), "none": None}
    opt_state = optax.adam(optax.constant_schedule(0.1)).init(parameters)
    opt_state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3, x.dtype), opt_state)
    return (parameters, opt_state, jax.random.key(1), 5, 0.25, True, np.float64(2.0))


def same_trees(a, b):
    def bits(leaf):
        is_key = jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    same = jax.tree.map(lambda x, y: same_bits(bits(x), bits(y)), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def test_optax_state_round_trips(run):
    assert run.load_checkpoint(example_state()) is None
    state = example_state()
    run.save_checkpoint(state, step=12)
    loaded, step = run.load_checkpoint(jax.tree.map(lambda leaf: leaf, state))
    assert step == 12
    assert same_trees(loaded, state)
    assert [type(leaf) for leaf in loaded[3:6]] == [int, float, bool]
    assert isinstance(loaded[0]["w"], np.ndarray)
    assert loaded[1][0].count.shape == ()


def test_a_checkpoint_is_read_into_abstract_shapes(run):
    state = (jnp.arange(3), jax.random.key(0), {"b": jnp.ones((2, 1), jnp.bfloat16)})
    run.save_checkpoint(state, step=1)
    loaded, _ = run.load_checkpoint(jax.eval_shape(lambda: state))
    assert same_trees(loaded, state)


def test_a_single_array_is_a_state(run):
    run.save_checkpoint(jnp.arange(3), step=0)
    state, step = run.load_checkpoint(np.zeros(3, np.int32))
    assert same_bits(state, np.arange(3, dtype=np.int32))
    assert step == 0


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"w": np.ones((3, 4)), "k": 1}, ["['w']", "float64[3, 2]", "float64[3, 4]"]),
        ({"w": np.ones((3, 2), "f4"), "k": 1}, ["['w']", "float64[3, 2]", "float32[3, 2]"]),
        ({"w": np.ones((3, 2)), "k": 1.0}, ["['k']", "int64[]", "float64[]"]),
        ({"w": np.ones((3, 2)), "k": 1, "v": 1}, ["['v']", "absent in the file"]),
        ({"w": np.ones((3, 2))}, ["['k']", "absent in this run"]),
        ({"w": np.ones((3, 2)), "k": None}, ["['k']", "absent in this run"]),
        (np.ones((3, 2)), ["leaf state is absent in the file"]),
    ],
)
def test_a_checkpoint_of_another_state_is_one_clear_error(run, like, words):
    run.save_checkpoint({"w": np.ones((3, 2)), "k": 1}, step=1)
    with pytest.raises(runs.RunFileError) as error:
        run.load_checkpoint(like)
    for word in [str(run.checkpoint), "delete it", *words]:
        assert word in str(error.value)


def test_another_key_type_is_an_error(run):
    run.save_checkpoint(jax.random.key(0), step=1)
    with pytest.raises(runs.RunFileError, match=r"key<fry>\[\].*key<rbg>\[\]"):
        run.load_checkpoint(jax.random.key(0, impl="rbg"))


def test_every_truncation_is_found(run):
    state = {"x": np.arange(4.0), "b": jnp.ones(2, jnp.bfloat16)}
    run.save_checkpoint(state, step=3)
    content = run.checkpoint.read_bytes()
    for size in range(0, len(content), 7):
        run.checkpoint.write_bytes(content[:size])
        with pytest.raises(runs.RunFileError, match=r"checkpoint\.npz is damaged.*delete it"):
            run.load_checkpoint(state)


def test_a_flipped_bit_is_found_or_harmless(run):
    state = {"x": np.arange(4.0), "b": jnp.ones(2, jnp.bfloat16)}
    run.save_checkpoint(state, step=3)
    content = run.checkpoint.read_bytes()
    found = 0
    generator = random.Random(0)
    for place in generator.sample(range(len(content)), 300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        run.checkpoint.write_bytes(damaged)
        try:
            loaded, step = run.load_checkpoint(state)
        except runs.RunFileError:
            found += 1
        else:
            assert step == 3
            assert same_trees(loaded, state)
    assert found > 150


def test_a_header_that_promises_less_than_is_there_is_found(tmp_path):
    path = tmp_path / "a.npz"
    runs.save_arrays(path, x=np.arange(4.0))
    content = path.read_bytes()
    assert content.count(b"(4,)") == 1
    path.write_bytes(content.replace(b"(4,)", b"(1,)"))
    with pytest.raises(runs.RunFileError, match="checksum"):
        runs.load_arrays(path)


def test_other_archives_are_no_checkpoints(run):
    runs.save_arrays(run.checkpoint, x=np.ones(2))
    with pytest.raises(runs.RunFileError, match="is not a checkpoint"):
        run.load_checkpoint(np.ones(2))


# Metrics


def rows(start, stop):
    return [{"step": i, "loss": jnp.float32(1 / (i + 1)), "note": "é"} for i in range(start, stop)]


def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path):
    whole = runs.open_run(tmp_path, "xp", "whole", Config(), seed=0)
    whole.truncate_metrics(0)
    whole.append_metrics(rows(0, 10))
    resumed = runs.open_run(tmp_path, "xp", "resumed", Config(), seed=0)
    resumed.append_metrics(rows(0, 6))
    resumed.append_metrics([{"step": 4, "loss": 0.0}])
    with open(resumed.metrics, "ab") as file:
        file.write(b'{"step": 3, "lo')
    resumed.truncate_metrics(4)
    assert [row["step"] for row in resumed.read_metrics()] == [0, 1, 2, 3]
    resumed.append_metrics(rows(4, 10))
    assert resumed.metrics.read_bytes() == whole.metrics.read_bytes()
    assert [row["step"] for row in resumed.read_metrics()] == list(range(10))


def test_every_torn_last_line_is_dropped(run):
    assert run.read_metrics() == []
    run.append_metrics(rows(0, 2))
    content = run.metrics.read_bytes()
    first = content.index(b"\n") + 1
    for size in range(first, len(content)):
        run.metrics.write_bytes(content[:size])
        assert [row["step"] for row in run.read_metrics()] == [0]
        run.truncate_metrics(5)
        assert run.metrics.read_bytes() == content[:first]


def test_truncation_without_need_writes_nothing(run):
    run.truncate_metrics(0)
    assert not run.metrics.exists()
    run.append_metrics(rows(0, 2))
    before = run.metrics.stat()
    run.truncate_metrics(2)
    after = run.metrics.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_not_finite_values_are_valid_json(run):
    losses = np.array([np.nan, np.inf, -np.inf, 1.5], np.float32)
    run.append_metrics([{"step": np.int64(0), "loss": jnp.float32(np.nan), "losses": losses}])

    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads(run.metrics.read_text(), parse_constant=reject)
    assert stored == {"step": 0, "loss": "NaN", "losses": ["NaN", "Infinity", "-Infinity", 1.5]}
    (row,) = run.read_metrics()
    assert math.isnan(row["loss"])
    assert same_bits(np.float32(row["losses"]), losses)


def test_bad_rows_are_refused_and_broken_lines_named(run):
    run.append_metrics(rows(0, 1))
    before = run.metrics.read_bytes()
    for bad in ({"loss": 1.0}, {"step": 1.5}, {"step": None}):
        with pytest.raises(ValueError, match="integer"):
            run.append_metrics([*rows(1, 2), bad])
    assert run.metrics.read_bytes() == before
    for line in (b"nonsense", b"[1]", b'{"loss": 1}', b'{"step": "x"}'):
        run.metrics.write_bytes(before + line + b"\n" + before)
        with pytest.raises(runs.RunFileError, match=r"metrics\.jsonl, line 2"):
            run.read_metrics()


# Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_stop(number, run):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    done = 0

    def loop():
        nonlocal done
        with runs.interruptible() as stop_requested:
            assert not stop_requested()
            for step in range(1, 5):
                if step == 2:
                    os.kill(os.getpid(), number)
                done = step
                if stop_requested():
                    raise runs.Interrupted(run.checkpoint, step)

    with pytest.raises(runs.Interrupted) as error:
        loop()
    assert done == 2
    assert isinstance(error.value, KeyboardInterrupt)
    assert str(run.checkpoint) in str(error.value)
    assert "step 2" in str(error.value)
    assert "resume" in str(error.value)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_interrupt_raises_at_once():
    before = signal.getsignal(signal.SIGINT)
    passed = []
    with pytest.raises(KeyboardInterrupt) as error, runs.interruptible():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        passed.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        passed.append("second")
    assert passed == ["first"]
    assert not isinstance(error.value, runs.Interrupted)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_unanswered_request_is_delivered_after_the_block():
    passed = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with runs.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            passed.append("inside")
        passed.append("after")
    assert passed == ["inside"]


def test_nested_blocks_pass_the_request_outwards():
    with pytest.raises(KeyboardInterrupt), runs.interruptible() as outer:  # noqa: PT012
        with runs.interruptible() as inner:
            os.kill(os.getpid(), signal.SIGINT)
            assert inner()
            assert not outer()
        assert outer()


def test_handlers_are_restored_after_an_error_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(ZeroDivisionError), runs.interruptible() as stop_requested:  # noqa: PT012
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
        with runs.interruptible() as stop_requested:
            seen.append((stop_requested(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


# Progress and environment


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Unreadable:
    def __float__(self):
        raise AssertionError("converted although nothing is shown")


def test_a_terminal_shows_a_bar_with_the_loss(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with runs.progress(10, initial=4, description="flow") as advance:
        advance(3, loss=jnp.float32(0.5))
        advance(3, loss=jnp.float32(0.25))
    last = sys.stderr.getvalue().split("\r")[-1]
    assert last.startswith("flow: 100%")
    assert "10/10" in last
    assert "loss=0.25" in last


@pytest.mark.parametrize("line_every", [None, 10.0])
def test_no_terminal_or_not_enabled_is_silent(capsys, line_every):
    enabled = line_every is None
    with runs.progress(10, description="flow", enabled=enabled, line_every=line_every) as advance:
        advance(10, loss=Unreadable())
    assert capsys.readouterr() == ("", "")


def test_log_files_get_a_line_now_and_then(capsys):
    with runs.progress(100, description="flow", line_every=0.2) as advance:
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


def test_the_environment_says_what_ran(x64):
    environment = runs.environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["versions"]["numpy"] == np.__version__
    assert environment["device"]["kind"] == jax.devices()[0].device_kind
    assert environment["cpu"]["cores"] >= 1
    assert environment["cpu"]["model"]
    assert environment["x64"] is True
    assert time.strptime(environment["time"][:10], "%Y-%m-%d")


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    environment = runs.environment()
    assert (environment["commit"], environment["dirty"]) == (None, None)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "start")
    environment = runs.environment()
    assert (environment["commit"], environment["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "new.py").write_text("")
    assert runs.environment()["dirty"] is True


def test_one_line_errors_name_the_kind_and_leave_the_status(capsys):
    for error, status in [(ValueError("lr is -1"), 1), (runs.Interrupted("here", 3), 130)]:
        with pytest.raises(SystemExit) as stopped, runs.one_line_errors():
            raise error
        assert stopped.value.code == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"{type(error).__name__}: {error}"
    with pytest.raises(KeyError), runs.one_line_errors():
        raise KeyError("a fault of our own keeps its traceback")
