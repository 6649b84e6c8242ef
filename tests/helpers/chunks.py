"""What the tests of loops in chunks (`lib.runs.loop`) share: counts, and stops at a step."""

import contextlib
import signal

import numpy as np


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
