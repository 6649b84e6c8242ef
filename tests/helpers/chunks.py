"""Of the tests of loops in chunks (`lib.runs.loop`): counts, stops at a step, and equal bits."""

import contextlib
import json
import signal

import jax
import numpy as np
import pytest

from lib.runs.console import Interrupted


def record_chunks(monkeypatch, after=lambda done: None, *, seconds=0.0):
    """Replaces the progress bar by a list of the steps of each chunk, and calls `after` with the
    steps done. Chunks take about so many seconds; of 0 seconds they are single steps."""
    sizes = []

    @contextlib.contextmanager
    def progress(total, *, initial, description, enabled, line_every):
        def tick(steps, **shown):
            sizes.append(steps)
            assert all(np.isfinite(value) for value in shown.values())
            after(initial + sum(sizes))

        yield tick

    monkeypatch.setattr("lib.runs.loop.SECONDS_PER_CHUNK", seconds)
    monkeypatch.setattr("lib.runs.loop.progress", progress)
    return sizes


def stop_after(monkeypatch, step, number=signal.SIGINT):
    """`record_chunks`, with a signal when `step` steps are done."""

    def after(done):
        if done == step:
            signal.raise_signal(number)

    return record_chunks(monkeypatch, after)


def metrics(run):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in run.metrics.read_bytes().splitlines()]


def assert_same_bits(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def interrupt(monkeypatch, train, *steps):
    """Runs `train` again and again, stopped after these steps."""
    for step in steps:
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted, match=f"after step {step};"):
                train()
