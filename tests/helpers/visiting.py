"""What the tests of loops in visits (`lib.runs.loop`) share: counts, and stops at a step."""

import contextlib
import signal

import numpy as np


def record_visits(monkeypatch, after=lambda done: None, *, module=None):
    """Replaces the progress bar by a list of the steps of each visit, and calls `after` with the
    steps done. With `module`, whose loop it is, there is a visit after every step."""
    visits = []

    @contextlib.contextmanager
    def progress(total, *, initial, description, enabled, line_every):
        def tick(steps, **shown):
            visits.append(steps)
            assert all(np.isfinite(value) for value in shown.values())
            after(initial + sum(visits))

        yield tick

    if module:
        monkeypatch.setattr(module, "SECONDS_BETWEEN_VISITS", 0.0)
    monkeypatch.setattr("lib.runs.loop.progress", progress)
    return visits


def stop_after(monkeypatch, step, number=signal.SIGINT, *, module=None):
    """`record_visits`, with a signal when `step` steps are done."""

    def after(done):
        if done == step:
            signal.raise_signal(number)

    return record_visits(monkeypatch, after, module=module)
