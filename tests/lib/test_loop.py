"""The loop in visits, alone: when it visits, saves and stops; its users are tested on bits."""

import signal
import types

import pytest
from visiting import record_visits, stop_after

from lib.runs import Run
from lib.runs.console import Interrupted
from lib.runs.loop import advance_in_visits


class Loop:
    """A loop that counts its steps, on a clock that they alone move."""

    def __init__(self, monkeypatch, seconds_a_step=1.0):
        self.now, self.done, self.saved, self.seconds = 0.0, 0, [], seconds_a_step
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr("lib.runs.loop.time", clock)

    def advance(self, num_steps):
        self.done += num_steps
        self.now += self.seconds * num_steps
        return {"done": self.done}

    def save(self):
        self.saved.append(self.done)

    def __call__(self, total, *, seconds_between=1.0, run=None, **options):
        options = {"done": self.done, "seconds_between": seconds_between, "run": run} | options
        advance_in_visits(self.advance, self.save, total=total, **options)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_visits_double_until_they_are_as_far_apart_as_asked(monkeypatch):
    visits, loop = record_visits(monkeypatch), Loop(monkeypatch)
    loop(40, seconds_between=9.0)
    assert visits == [1, 2, 4, 8, 9, 9, 7]
    assert loop.done == 40


def test_slow_steps_are_visited_one_by_one(monkeypatch):
    visits, loop = record_visits(monkeypatch), Loop(monkeypatch, seconds_a_step=5.0)
    loop(4)
    assert visits == [1, 1, 1, 1]


def test_steps_that_become_slow_are_visited_sooner(monkeypatch):
    """Eight steps that took four times as long as they should: two the next time."""
    visits, loop = record_visits(monkeypatch), Loop(monkeypatch)

    def advance(num_steps):
        loop.seconds = 4.0 if num_steps == 8 else 1.0
        return Loop.advance(loop, num_steps)

    loop.advance = advance
    loop(19, seconds_between=8.0)
    assert visits == [1, 2, 4, 8, 2, 2]


def test_no_visit_takes_more_steps_than_the_most(monkeypatch):
    visits, loop = record_visits(monkeypatch), Loop(monkeypatch)
    loop(10, seconds_between=1e9, most=3)
    assert visits == [1, 2, 3, 3, 1]


def test_a_clock_that_stands_still_doubles_for_ever(monkeypatch):
    visits, loop = record_visits(monkeypatch), Loop(monkeypatch, seconds_a_step=0.0)
    loop(20)
    assert visits == [1, 2, 4, 8, 5]


def test_saves_are_so_many_seconds_apart_and_at_the_end(monkeypatch, run):
    loop = Loop(monkeypatch)
    loop(10, run=run, checkpoint_seconds=2.5, show_progress=False)
    assert loop.saved == [3, 6, 9, 10]
    without = Loop(monkeypatch)
    without(10, checkpoint_seconds=2.5, show_progress=False)
    assert without.saved == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_stops_and_is_gone_on_from(monkeypatch, run, number):
    loop = Loop(monkeypatch)
    with monkeypatch.context() as patch:
        visits = stop_after(patch, 3, number)
        with pytest.raises(Interrupted, match="after step 3;") as caught:
            loop(7, run=run)
    assert visits == [1, 1, 1]
    assert str(run.checkpoint) in str(caught.value)
    assert loop.saved == [3]
    visits = record_visits(monkeypatch)
    loop(7, run=run)
    assert visits == [1, 1, 1, 1]
    assert loop.saved == [3, 7]


def test_what_is_shown_is_kept_without_what_a_resumed_run_does_again(monkeypatch, run):
    loop = Loop(monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            loop(7, run=run)
    assert run.read_metrics() == [{"step": step, "done": step + 1} for step in range(3)]
    # A process that was killed between the metrics of a save and its checkpoint.
    run.append_metrics([{"step": 3, "done": -1}])
    loop(7, run=run, show_progress=False)
    assert run.read_metrics() == [{"step": step, "done": step + 1} for step in range(7)]


def test_a_signal_without_a_folder_is_a_keyboard_interrupt(monkeypatch):
    loop, visits = Loop(monkeypatch), stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt) as caught:
        loop(7)
    assert not isinstance(caught.value, Interrupted)
    assert visits == [1, 1]
    assert loop.saved == []


def test_a_signal_at_the_last_step_comes_after_the_last_save(monkeypatch, run):
    loop = Loop(monkeypatch)
    stop_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt) as caught:
        loop(7, run=run)
    assert not isinstance(caught.value, Interrupted)
    assert loop.saved == [7]


def test_an_error_of_a_step_is_not_saved_after_but_what_led_to_it_is_kept(monkeypatch, run):
    loop = Loop(monkeypatch)

    def advance(num_steps):
        if loop.done == 3:
            raise FloatingPointError("in step 3")
        return Loop.advance(loop, num_steps)

    loop.advance = advance
    with pytest.raises(FloatingPointError, match="in step 3"):
        loop(7, run=run, checkpoint_seconds=1.5, show_progress=False)
    assert loop.saved == [2]
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2]


def test_what_is_done_is_left_alone(monkeypatch, run):
    loop, visits = Loop(monkeypatch), record_visits(monkeypatch)
    loop.done = 7
    loop(7, run=run)
    assert visits == loop.saved == []
