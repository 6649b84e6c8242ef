"""Between a command and who runs it: progress, stops on request, errors in one line."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from lib.runs import processes

STATUS_OF_A_STOP = 130


class Interrupted(KeyboardInterrupt):
    """A run stopped on request after `step` steps, its state saved in `checkpoint`."""

    def __init__(self, checkpoint: str | os.PathLike, step: int):
        super().__init__(
            f"stopped on request after step {step}; the state is in {checkpoint}: "
            "run the same command again to resume"
        )


@contextlib.contextmanager
def one_line_errors(*, lower: str = "") -> Iterator[None]:
    """For commands: bad input, a diverged flow, a file that cannot be written, memory that does not
    suffice, devices that are not there, or a requested stop end in one line on stderr.

    `lower` names the command's options that memory depends on, for the line about memory. The exit
    status is 1, and 130 after a stop. `python -X dev` keeps the traceback.
    """
    try:
        yield
    except (Exception, Interrupted) as error:
        line = _line(error, lower)
        if line is None or sys.flags.dev_mode:
            raise
        print(line, file=sys.stderr)
        sys.exit(STATUS_OF_A_STOP if isinstance(error, Interrupted) else 1)


def _line(error: BaseException, lower: str) -> str | None:
    """What to say of an error in one line; None where it is a fault of our own."""
    if isinstance(error, ValueError | OSError | FloatingPointError | Interrupted):
        return f"{type(error).__name__}: {error}"
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if exhausted or isinstance(error, MemoryError):
        advice = f"lower {lower}" if lower else "take a smaller problem"
        reason = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        return f"Out of memory: {advice}, or use a machine with more{reason}"
    if isinstance(error, RuntimeError | AssertionError):
        return processes.missing_platforms()
    return None


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM ask for a stop instead of raising: what it yields tells
    whether one did, and a loop then saves and raises `Interrupted`.

    A SIGINT after the first request raises KeyboardInterrupt as soon as Python can, that is when a
    running device call returns. A request that the block ends without answering is delivered again
    after it, to the handlers of before, so that none is lost: do the final save inside the block.
    Signals that the process ignores stay ignored. Off the main thread the block changes nothing.
    """
    requests: list[int] = []
    previous = {}

    def request(number: int, frame: Any) -> None:
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # None is a handler that was not set from Python and could not be set back.
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                previous[number] = signal.signal(number, request)
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if requests:
        signal.raise_signal(requests[0])


class _Lines:
    """A stderr on which each of tqdm's redrawn bars is a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")


@contextlib.contextmanager
def progress(
    total: int,
    *,
    initial: int = 0,
    description: str,
    enabled: bool = True,
    line_every: float | None = None,
) -> Iterator[Callable[..., None]]:
    """Yields `advance(steps, **shown)`, which moves a tqdm bar on stderr and shows the values; of
    several processes the first shows them.

    Where stderr is no terminal nothing is shown, or, with `line_every`, a line that many seconds
    apart and at both ends. Values are converted to floats only when something is shown.
    """
    enabled = enabled and processes.is_first()
    if sys.stderr.isatty():
        style = {"dynamic_ncols": True}
    elif line_every is not None:
        style = {"file": _Lines(), "mininterval": line_every, "ncols": 0}
    else:
        enabled, style = False, {}
    with tqdm(
        total=total, initial=initial, desc=description, disable=not enabled, miniters=1, **style
    ) as bar:

        def advance(steps: int, **shown: Any) -> None:
            if enabled:
                values = (f"{name}={float(value):.4g}" for name, value in shown.items())
                bar.set_postfix_str(", ".join(values), refresh=False)
                bar.update(steps)

        yield advance
