"""The loop in chunks, on a clock of its own: when it saves, stops, resumes; what it refuses."""

import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chunks import metrics, record_chunks, stop_after

from lib.runs import Run
from lib.runs.console import Interrupted
from lib.runs.files import RunFileError
from lib.runs.loop import (
    Chunk,
    DivergedError,
    fingerprint,
    first_nonfinite,
    run_steps,
    traced,
    traced_optimizer,
)


class Loop:
    """Sums up the numbers of its steps, on a clock that only they move."""

    def __init__(self, monkeypatch, seconds_a_step=1.0):
        self.now, self.seconds, self.sums = 0.0, seconds_a_step, np.full(50, np.nan)
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("lib.runs.loop.time", clock)

    def advance(self, state, done, size):
        for step in range(done, done + size):
            state = {"sum": state["sum"] + step}
            self.sums[step] = state["sum"]
        self.now += self.seconds * size
        return Chunk(state, {"done": done + size})

    def __call__(self, total, run=None, identity=(("start", 0),), **options):
        self.sums[:] = np.nan
        return run_steps(
            self.advance,
            {"sum": 0},
            total,
            run=run,
            identity=lambda: dict(identity),
            history=lambda done: self.sums[:done],
            show_progress=False,
            **options,
        )


@pytest.fixture
def loop(monkeypatch):
    return Loop(monkeypatch)


@pytest.fixture
def saves(monkeypatch):
    """The steps of the saves that have succeeded."""
    steps, save = [], Run.save_checkpoint

    def saved(run, state, *, step, **options):
        save(run, state, step=step, **options)
        steps.append(step)

    monkeypatch.setattr(Run, "save_checkpoint", saved)
    return steps


@pytest.mark.parametrize(
    ("seconds", "seconds_a_step", "max_chunk", "sizes"),
    [
        (9.0, 1.0, None, [1, 2, 4, 8, 9, 9, 7]),  # doubles until it is as long as asked
        (1.0, 15.0, None, [1] * 40),
        (1e9, 1.0, 12, [1, 2, 4, 8, 12, 12, 1]),
        (1.0, 0.0, None, [1, 2, 4, 8, 16, 9]),  # a clock that stands still
    ],
)
def test_sizes_of_chunks(monkeypatch, seconds, seconds_a_step, max_chunk, sizes):
    chunks = record_chunks(monkeypatch, seconds=seconds)
    state, done = Loop(monkeypatch, seconds_a_step)(40, max_chunk=max_chunk)
    assert chunks == sizes
    assert (int(state["sum"]), done) == (780, 40)


def test_chunks_of_steps_that_become_slow_are_shorter(monkeypatch, loop):
    """Eight steps that took four times as long as they should: two the next time."""
    chunks = record_chunks(monkeypatch, seconds=8.0)

    def advance(state, done, size):
        loop.seconds = 4.0 if size == 8 else 1.0
        return Loop.advance(loop, state, done, size)

    loop.advance = advance
    loop(19)
    assert chunks == [1, 2, 4, 8, 2, 2]


def test_saves_are_so_many_seconds_apart_and_at_the_end(monkeypatch, loop, run, saves):
    record_chunks(monkeypatch)
    loop(10, run, checkpoint_seconds=2.5)
    assert saves == [3, 6, 9, 10]
    loop(10, checkpoint_seconds=2.5)
    assert saves == [3, 6, 9, 10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_a_second_call_goes_on(monkeypatch, loop, run, saves, number):
    with monkeypatch.context() as patch:
        chunks = stop_after(patch, 3, number)
        with pytest.raises(Interrupted, match="after step 3;") as caught:
            loop(7, run)
    assert chunks == [1, 1, 1]
    assert str(run.checkpoint) in str(caught.value)
    # A process that was killed between the metrics of a save and its checkpoint.
    run.append_metrics([{"step": 3, "done": -1}])
    chunks = record_chunks(monkeypatch)
    for total in (7, 7, 9):  # it goes on, is read back, is extended
        state, done = loop(total, run)
        assert (int(state["sum"]), done) == (total * (total - 1) // 2, total)
        np.testing.assert_array_equal(loop.sums[:total], np.cumsum(range(total)))
    assert chunks == [1] * 6
    assert saves == [3, 7, 9]
    assert metrics(run) == [{"step": step, "done": step + 1} for step in range(9)]


@pytest.mark.parametrize(("step", "stored"), [(2, False), (7, True)])
def test_a_signal_without_a_folder_or_after_the_last_save_is_a_keyboard_interrupt(
    monkeypatch, loop, run, saves, step, stored
):
    chunks = stop_after(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt) as caught:
        loop(7, run if stored else None)
    assert not isinstance(caught.value, Interrupted)
    assert chunks == [1] * step
    assert saves == [7] * stored


def test_a_loop_that_has_converged_ends_and_stays_there(monkeypatch, loop, run):
    chunks = record_chunks(monkeypatch)
    for _ in range(2):
        state, done = loop(40, run, converged=lambda done: done > 0 and loop.sums[done - 1] >= 10)
        assert (int(state["sum"]), done) == (10, 5)
    assert chunks == [1] * 5


def test_divergence_names_the_step_and_saves_the_state_before_its_chunk(monkeypatch, loop, run):
    record_chunks(monkeypatch, seconds=1e9)

    def advance(state, done, size):
        return Loop.advance(loop, state, done, size)._replace(bad_step=2 if done == 3 else None)

    loop.advance = advance
    for _ in range(2):  # the same command stops at the same place
        with pytest.raises(DivergedError, match=r"in step 5 \(counted.*lower the step") as caught:
            loop(40, run)
        assert isinstance(caught.value, FloatingPointError)
        assert str(run.checkpoint) in str(caught.value)
        assert (int(caught.value.state["sum"]), caught.value.step) == (3, 3)
        (state, _), step = run.load_checkpoint(
            lambda step: ({"sum": np.int32(0)}, loop.sums[:step])
        )
        assert (state["sum"], step) == (3, 3)
        assert [row["step"] for row in metrics(run)] == [0, 2]
    loop.advance = types.MethodType(Loop.advance, loop)
    loop(7, run)
    assert [row["step"] for row in metrics(run)] == [0, 2, 3, 5, 6]


def test_where_numbers_cease_to_be_finite():
    values = np.ones((4, 2))
    assert [first_nonfinite(values, finite) for finite in (True, False)] == [None, 3]
    values[1:3, 1] = np.inf, np.nan
    assert first_nonfinite(values, False) == 1
    assert first_nonfinite(values[:, 0], True) is None


def test_after_an_error_it_goes_on_from_the_last_save(monkeypatch, loop, run, saves):
    record_chunks(monkeypatch)

    def advance(state, done, size):
        if done == 3:
            raise FloatingPointError("in step 3")
        return Loop.advance(loop, state, done, size)

    loop.advance = advance
    with pytest.raises(FloatingPointError, match="in step 3"):
        loop(7, run, checkpoint_seconds=1.5)
    assert saves == [2]
    loop.advance = types.MethodType(Loop.advance, loop)
    loop(7, run)
    np.testing.assert_array_equal(loop.sums[:7], np.cumsum(range(7)))
    assert [row["step"] for row in metrics(run)] == list(range(7))


def test_what_is_promoted_does_not_depend_on_a_stop(loop, run):
    """Weak types would not come back from a checkpoint."""
    kinds = []
    loop.advance = lambda state, done, size: Chunk(
        kinds.append(state["sum"].weak_type) or state, {}
    )
    loop(1, run)
    loop(2, run)
    assert kinds == [False, False]


# What a checkpoint belongs to


def test_the_checkpoint_of_another_run_is_refused_and_left_alone(loop, run):
    loop(7, run, {"start": 0, "key": jax.random.key(0), "rate": 0.1}.items())
    before = run.checkpoint.read_bytes()
    other = {"start": 0, "key": jax.random.key(1), "rate": 0.2}
    with pytest.raises(RunFileError, match=r"run with another key, rate, .*delete its folder"):
        loop(9, run, other.items())
    with pytest.raises(RunFileError, match="is at step 7, past the 6 asked for"):
        loop(6, run, {"start": 0, "key": jax.random.key(0), "rate": 0.1}.items())
    assert run.checkpoint.read_bytes() == before
    run.save_checkpoint({"particles": np.ones(3)}, step=3)  # as those of before
    with pytest.raises(RunFileError, match="another start, or was made by another version"):
        loop(9, run)


def same(one, other):
    return np.array_equal(fingerprint(one), fingerprint(other))


def test_a_fingerprint_is_of_places_shapes_dtypes_and_bits(monkeypatch):
    x = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    assert same({"a": x, "b": None}, {"a": jnp.asarray(x), "b": None})
    assert same(jax.random.key(3), jax.random.key(3))
    others = [x[:5], x.T, x.reshape(4, 3), x.astype(np.float64), -x, x.view(np.int32), (x,), [x, 1]]
    others += [jax.random.key(3), jax.random.key(4), 1, 1.0, True, "1", None, np.float32(1)]
    prints = {fingerprint(other).tobytes() for other in [x, *others]}
    assert len(prints) == 1 + len(others)
    monkeypatch.setattr("lib.runs.loop._HASHED_BYTES", 16)  # two rows at a time
    assert fingerprint(x).tobytes() in prints
    assert same(len, len)


def test_a_function_is_known_by_its_program_with_what_it_closes_over():
    def scaled(factor, table):
        return lambda x: jax.nn.relu(factor * x) + table[0]

    def of(factor, table):
        return traced(scaled(factor, jnp.asarray(table)), jnp.ones(3))

    assert same(of(2.0, [1.0, 2.0]), of(2.0, [1.0, 2.0]))
    assert not same(of(2.0, [1.0, 2.0]), of(2.1, [1.0, 2.0]))
    assert not same(of(2.0, [1.0, 2.0]), of(2.0, [1.0, 2.1]))


def test_an_optimizer_is_known_by_all_its_settings():
    schedules = [optax.linear_schedule(0.1, 0.0, steps) for steps in (1000, 9000)]
    schedules += [optax.piecewise_constant_schedule(0.1, {500: 0.1})]
    optimizers = [optax.sgd(0.1, momentum) for momentum in (None, 0.5, 0.6)]
    optimizers += [optax.adam(step_size) for step_size in (0.1, 0.2, *schedules)]
    optimizers += [optax.adam(0.1, b1=0.5), optax.adam(0.1, eps=1e-2)]
    optimizers += [optax.chain(optax.clip(1.0), optax.adam(0.1))]

    def of(optimizer):
        return fingerprint(traced_optimizer(optimizer, {"w": jnp.ones((2, 3))})).tobytes()

    assert len({of(optimizer) for optimizer in optimizers}) == len(optimizers)
    assert of(optax.adam(0.1)) == of(optax.adam(0.1))
