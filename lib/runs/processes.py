"""Several hosts: what processes agree on, who writes, and what a command runs on.

With several processes (`jax.distributed`) each runs the same command, takes part in every step, and
reads what its own devices need; only the first writes files (`lib.runs.files`) and shows
progress. The folder of results is one that all of them see.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lib.devices import device_mesh


def several_processes() -> bool:
    """Whether other processes work on this command too."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return not several_processes() or jax.process_index() == 0


_ALONE: list[str] = []


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[bool]:
    """Yields whether this process is the first, between two moments at which all have come here:
    what the first one does inside is done for those who go on after it. Inside another such block
    it is that block's moments that count. `what` must be the same for all: processes that have
    parted ways fail rather than hang."""
    if _ALONE or not several_processes():
        yield is_first()
        return
    multihost_utils.sync_global_devices(f"before {what}")
    _ALONE.append(what)
    try:
        yield is_first()
    finally:
        _ALONE.pop()
    multihost_utils.sync_global_devices(f"after {what}")


def agreed(num_steps: int, stopping: bool, due: bool) -> tuple[int, bool, bool]:
    """What all processes of a long loop do next: as many steps as the first would, a stop where any
    was asked to, a save where the first is due. Clocks and signals differ between processes."""
    if not several_processes():
        return num_steps, stopping, due
    proposals = multihost_utils.process_allgather(np.array([num_steps, stopping, due], np.int32))
    return int(proposals[0, 0]), bool(proposals[:, 1].any()), bool(proposals[0, 2])


def own_share(count: int) -> range:
    """Which of `count` pieces of work are this process's: every P-th of P processes."""
    return range(jax.process_index(), count, jax.process_count())


def gathered(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The results of all `count` pieces [count, ...], of each process those of its `own_share`;
    bit for bit, in any dtype. Raises ValueError where there are fewer pieces than processes."""
    if not several_processes():
        return np.stack(rows)
    if count < jax.process_count():
        raise ValueError(f"{count} pieces of work for {jax.process_count()} processes")
    most = -(-count // jax.process_count())
    own = np.stack([*rows, *[rows[-1]] * (most - len(rows))])
    bits = multihost_utils.process_allgather(np.frombuffer(own.tobytes(), np.uint8))
    shares = np.frombuffer(bits.tobytes(), own.dtype).reshape(-1, *own.shape)
    return np.swapaxes(shares, 0, 1).reshape(-1, *own.shape[1:])[:count]


# ---- Commands


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What a command runs on."""

    devices: int | None = None
    """How many devices share the work, of all hosts together; None: one, of several hosts all that
    they have. Without accelerator: into how many devices the cores are divided."""
    coordinator: str | None = None
    """Several hosts, with the same command on each: ADDRESS:PORT of the first. "auto" under Slurm
    and Open MPI; elsewhere the next two are needed as well. None: the environment's
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, if set."""
    num_processes: int | None = None
    process_id: int | None = None


def missing_platforms() -> str | None:
    """What is wrong with JAX_PLATFORMS where JAX finds no device of what it names; None where it
    finds one."""
    asked = jax.config.values["jax_platforms"]
    with contextlib.suppress(RuntimeError, AssertionError):  # the latter for cuda without a plugin
        jax.devices()
        return None
    try:
        jax.config.update("jax_platforms", None)
        there, count = jax.default_backend(), jax.device_count()
    except (RuntimeError, AssertionError):
        return None
    finally:
        jax.config.update("jax_platforms", asked)
    return (
        f"JAX_PLATFORMS={asked}: JAX finds no such device here, only {count} of the platform "
        f"{there}. Unset it, set JAX_PLATFORMS={there}, or install what JAX needs for that "
        "platform (NVIDIA: requirements-cuda13.txt)"
    )


@contextlib.contextmanager
def started(options: DeviceOptions) -> Iterator[Mesh | None]:
    """Connects the processes, if there are several, and yields their mesh, None for one device.

    To be entered before anything asks JAX for a device. In processes but the first, what is printed
    goes nowhere. Raises ValueError on options that do not fit together or the machine.
    """
    options = _with_environment(options)
    hosts = options.num_processes or 1
    single = options.coordinator is None and options.devices in (None, 1)
    if single:  # else JAX would take three quarters of the other GPUs' memory too
        jax.config.update("jax_cuda_visible_devices", "0")
    if options.devices is not None:
        if options.devices < 1 or options.devices % hosts:
            raise ValueError(f"--devices {options.devices} cannot be shared by {hosts} processes")
        # Too late where a device was asked for before: then there are as many as there are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", options.devices // hosts)
    if options.coordinator is not None:
        address = None if options.coordinator == "auto" else options.coordinator
        jax.distributed.initialize(address, options.num_processes, options.process_id)
    mesh = device_mesh(1 if single else options.devices)
    with contextlib.ExitStack() as stack:
        if options.coordinator is not None:
            stack.callback(jax.distributed.shutdown)
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        elif mesh.size > 1:
            kind, num_processes = mesh.devices.flat[0].device_kind, jax.process_count()
            where = f", {num_processes} processes" if num_processes > 1 else ""
            print(f"on {mesh.size} devices ({kind}{where})", file=sys.stderr, flush=True)
        yield mesh if mesh.size > 1 else None


def _with_environment(options: DeviceOptions) -> DeviceOptions:
    """The options, and where none names a coordinator, what the environment says."""
    if options.coordinator is None and (address := os.environ.get("JAX_COORDINATOR_ADDRESS")):
        names = ("num_processes", "process_id")
        given = {name: os.environ.get(f"JAX_{name.upper()}") for name in names}
        numbers = {name: int(number) for name, number in given.items() if number is not None}
        options = dataclasses.replace(options, coordinator=address, **numbers)
    count, own = options.num_processes, options.process_id
    if options.coordinator is None:
        if (count, own) != (None, None):
            raise ValueError("--num_processes and --process_id need --coordinator ADDRESS:PORT")
    elif options.coordinator != "auto" and (count is None or own is None or not 0 <= own < count):
        raise ValueError(
            f"--coordinator {options.coordinator} needs --num_processes and a --process_id below "
            f"it, got {count} and {own}"
        )
    return options
