"""Long compiled loops, visited by the host: progress, saves, and stops on request.

A loop advances so many steps by one call of a compiled function, as many as take about the time
between two visits; at a visit the host shows progress, saves what is due, and stops if asked to.
What a step computes must not depend on where visits fall. What is shown goes into the run's
metrics.jsonl too, at the next save.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from lib.runs import processes
from lib.runs._folders import Run
from lib.runs.console import Interrupted, interruptible, progress


def advance_in_visits(
    advance: Callable[[int], Mapping[str, Any]],
    save: Callable[[], None],
    *,
    done: int,
    total: int,
    seconds_between: float,
    run: Run | None,
    most: int | None = None,
    checkpoint_seconds: float = 60.0,
    show_progress: bool = True,
    description: str = "",
) -> None:
    """Calls `advance(num_steps)` until `total` steps are done, `done` of them before.

    Args:
      advance: takes so many steps, waits for them, and returns what to show.
      save: writes what to resume from; called about every `checkpoint_seconds`, at the end, and
        before a stop, if there is a `run`.
      seconds_between: between two visits.
      most: steps between two visits, at most.

    SIGINT and SIGTERM save and raise `Interrupted`, or KeyboardInterrupt without a run. Several
    processes (`lib.runs.processes`) all take the same steps between the same visits.
    """
    num_steps, saved = 1, time.monotonic()
    rows: list[dict[str, Any]] = []
    if run:
        run.truncate_metrics(done)
    with (
        interruptible() as stop_requested,
        progress(
            total,
            initial=done,
            description=description,
            enabled=show_progress,
            line_every=10.0,
        ) as tick,
    ):
        while done < total:
            num_steps = min(num_steps, total - done)
            started = time.monotonic()
            try:
                shown = advance(num_steps)
            except FloatingPointError:  # what led to it
                if run:
                    run.append_metrics(rows)
                raise
            seconds = max(time.monotonic() - started, 1e-9)  # a coarse clock may not have moved
            done += num_steps
            tick(num_steps, **shown)
            rows.append({"step": done - 1, **shown})
            # Doubling at most: the first visit's time is mostly compilation.
            num_steps = max(1, int(num_steps * min(2.0, seconds_between / seconds)))
            num_steps = min(num_steps, most or num_steps)
            due = time.monotonic() - saved > checkpoint_seconds
            num_steps, stopping, due = processes.agreed(
                processes.NextVisit(num_steps, stop_requested(), due)
            )
            finished = done == total
            if stopping or finished or due:
                if run:
                    run.append_metrics(rows)
                    save()
                saved, rows = time.monotonic(), []
            if stopping and not finished:
                if run:
                    raise Interrupted(run.checkpoint, done)
                raise KeyboardInterrupt
