"""Several devices and several hosts: meshes, where arrays lie, and what processes agree on.

JAX's own runtime does the work: a mesh of all devices that a command may use, arrays placed on it,
`jax.shard_map` over axes whose parts do not depend on each other, and `jax.distributed` for several
hosts. With several processes each runs the same command; the first alone writes files and prints
(`lib.runs`), and the folder of results is one that all of them see.

A mesh is an argument (`mesh=None` is one device) of every function that can use one. `current()` is
the mesh of the running command, for commands alone: nothing else in `lib` asks for it.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import PyTree

AXIS = "devices"
"""The one axis of a mesh."""


def device_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of the first `num_devices` devices of all processes, or of all there are.

    Raises ValueError where there are fewer, and where a process would be left without any.
    """
    found = jax.devices()
    wanted = len(found) if num_devices is None else num_devices
    if not 1 <= wanted <= len(found):
        raise ValueError(f"{wanted} devices asked for, there are {len(found)}: {found}")
    chosen = found[:wanted]
    if {device.process_index for device in chosen} != set(range(jax.process_count())):
        raise ValueError(f"{wanted} devices leave one of {jax.process_count()} processes without")
    return Mesh(np.array(chosen), (AXIS,))


# ---- Where arrays lie


def place(tree: PyTree, mesh: Mesh | None, spec: Spec = Spec()) -> PyTree:  # noqa: B008
    """The arrays on the mesh: whole on every device, or divided as `spec` says.

    All processes must hold equal values; each hands over what its own devices need.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    sharding = NamedSharding(mesh, spec)

    def put(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and mesh.is_multi_process:
            leaf = np.asarray(leaf)
        if isinstance(leaf, jax.Array) or not mesh.is_multi_process:
            return jax.device_put(leaf, sharding)
        leaf = np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def constrain(tree: PyTree, mesh: Mesh | None, spec: Spec = Spec()) -> PyTree:  # noqa: B008
    """Inside jit: the arrays as `place` would put them. A loop whose results lie as its arguments
    did is compiled once."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def divided(shape: Sequence[int], axes: Sequence[int], mesh: Mesh | None) -> Spec:
    """The spec that divides the first of `axes` that all devices can share equally; none, none."""
    for axis in axes if mesh is not None else ():
        if shape[axis] % mesh.size == 0:
            return Spec(*[AXIS if i == axis % len(shape) else None for i in range(len(shape))])
    return Spec()


def fetch(tree: PyTree) -> PyTree:
    """The arrays as NumPy's, on every process, wherever their parts lie."""

    def get(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                mesh = leaf.sharding.mesh
                leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, Spec()))(leaf)
            leaf = leaf.addressable_data(0)
        return np.asarray(leaf)

    return jax.tree.map(get, tree)


def grid(mesh: Mesh, rows: int, columns: int, names: tuple[str, str]) -> Mesh:
    """The devices as a rectangle for rows x columns of equal work, chosen so that the busiest has
    least; every column of devices takes as many columns."""

    def busiest(across: int) -> tuple[int, int]:
        return -(-rows // (mesh.size // across)) * (columns // across), across

    across = min(
        (k for k in range(1, mesh.size + 1) if mesh.size % k == 0 and columns % k == 0),
        key=busiest,
    )
    return Mesh(mesh.devices.reshape(-1, across), names)


def over_devices(
    function: Callable,
    mesh: Mesh | None,
    *,
    whole: int = 0,
    axis: str = AXIS,
    specs: tuple[Spec, ...] | None = None,
) -> Callable:
    """`function(*whole arrays, *arrays)`, whose results have the arrays' leading axis, with that
    axis divided over the devices of the mesh.

    The first `whole` arguments go to every device as they are, or divided as `specs` says. A
    leading axis that the devices cannot share equally is filled up with copies of its last row,
    whose results are cut off. The function must treat each row by itself. Differentiable.
    """
    if mesh is None or mesh.size == 1:
        return function
    of_whole = specs or (Spec(),) * whole

    def on_all(*arguments):
        shared, rows = arguments[:whole], arguments[whole:]
        count = jax.tree.leaves(rows)[0].shape[0]
        missing = -count % mesh.shape[axis]

        def fill(leaf):
            return jnp.concatenate([leaf, *[leaf[-1:]] * missing])

        rows = jax.tree.map(fill, rows) if missing else rows
        in_specs = (*of_whole, *(Spec(axis),) * len(rows))
        found = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=Spec(axis), check_vma=False
        )(*shared, *rows)
        return jax.tree.map(lambda leaf: leaf[:count], found) if missing else found

    return on_all


# ---- Several processes


def several_processes() -> bool:
    """Whether other processes work on this command too."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return not several_processes() or jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here. `what` must be the same for all: processes that
    have parted ways fail rather than hang."""
    if several_processes():
        multihost_utils.sync_global_devices(what)


_ALONE: list[str] = []


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[bool]:
    """Yields whether this process is the first, between two moments at which all have come here:
    what the first one does inside is done for those who go on after it. Inside another such block
    it is that block's moments that count."""
    if _ALONE:
        yield is_first()
        return
    wait_for_all(f"before {what}")
    _ALONE.append(what)
    try:
        yield is_first()
    finally:
        _ALONE.pop()
    wait_for_all(f"after {what}")


class NextVisit(NamedTuple):
    """What a long loop does next: so many steps, unless it stops; a save before, if one is due."""

    num_steps: int
    stopping: bool
    due: bool


def agreed(proposed: NextVisit) -> NextVisit:
    """What all processes do next: as many steps as the first would, a save where the first is due,
    a stop where any was asked to. Clocks and signals differ between processes."""
    if not several_processes():
        return proposed
    found = multihost_utils.process_allgather(np.array(proposed, np.int32))
    return NextVisit(int(found[0, 0]), bool(found[:, 1].any()), bool(found[0, 2]))


def own_share(count: int) -> range:
    """Which of `count` pieces of work are this process's: every P-th of P processes."""
    if not several_processes():
        return range(count)
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
    bits = np.frombuffer(own.tobytes(), np.uint8)
    found = multihost_utils.process_allgather(bits)
    found = np.frombuffer(np.asarray(found).tobytes(), own.dtype)
    found = found.reshape(-1, *own.shape)  # [processes, most, ...]
    return np.swapaxes(found, 0, 1).reshape(-1, *own.shape[1:])[:count]


# ---- Commands


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What a command runs on."""

    devices: int | None = None
    """How many devices share the work, of all hosts together; None: all there are. Without
    accelerator: into how many devices the cores are divided (None: one)."""
    coordinator: str | None = None
    """Several hosts, with the same command on each: ADDRESS:PORT of the first. "auto" under Slurm
    and Open MPI; elsewhere the next two are needed as well. None: the environment's
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, if set."""
    num_processes: int | None = None
    process_id: int | None = None


_CURRENT: list[Mesh] = []


def current_devices() -> tuple[jax.Device, ...] | None:
    """The devices of `current()`, for what takes a list of them."""
    return tuple(current().devices.flat) if current() else None


def current() -> Mesh | None:
    """The mesh of the running command; None for one device."""
    return _CURRENT[-1] if _CURRENT else None


@contextlib.contextmanager
def started(options: DeviceOptions) -> Iterator[Mesh | None]:
    """Connects the processes, if there are several, and makes their mesh the current one.

    To be entered before anything asks JAX for a device. In processes but the first, what is printed
    goes nowhere. Raises ValueError on options that do not fit together or the machine.
    """
    options = _with_environment(options)
    hosts = options.num_processes or 1
    if options.devices is not None:
        if options.devices < 1 or options.devices % hosts:
            raise ValueError(f"--devices {options.devices} cannot be shared by {hosts} processes")
        # Too late where a device was asked for before: then there are as many as there are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", options.devices // hosts)
    if options.coordinator is not None:
        address = None if options.coordinator == "auto" else options.coordinator
        jax.distributed.initialize(address, options.num_processes, options.process_id)
    mesh = device_mesh(options.devices)
    with contextlib.ExitStack() as stack:
        if options.coordinator is not None:
            stack.callback(jax.distributed.shutdown)
        if mesh.size > 1:
            _CURRENT.append(mesh)
            stack.callback(_CURRENT.pop)
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        elif mesh.size > 1:
            kind, num_processes = mesh.devices.flat[0].device_kind, jax.process_count()
            where = f", {num_processes} processes" if num_processes > 1 else ""
            print(f"on {mesh.size} devices ({kind}{where})", file=sys.stderr, flush=True)
        yield current()


def _with_environment(options: DeviceOptions) -> DeviceOptions:
    """The options, and where none names a coordinator, what the environment says."""
    if options.coordinator is None and (address := os.environ.get("JAX_COORDINATOR_ADDRESS")):
        numbers = {}
        for field in ("num_processes", "process_id"):
            given = os.environ.get(f"JAX_{field.upper()}")
            numbers[field] = getattr(options, field) if given is None else int(given)
        options = dataclasses.replace(options, coordinator=address, **numbers)
    alone = options.num_processes is None and options.process_id is None
    if options.coordinator is None and not alone:
        raise ValueError("--num_processes and --process_id need --coordinator ADDRESS:PORT")
    if options.coordinator not in (None, "auto"):
        count, own = options.num_processes, options.process_id
        if count is None or own is None or not 0 <= own < count:
            raise ValueError(
                f"--coordinator {options.coordinator} needs --num_processes and a --process_id "
                f"below it, got {count} and {own}"
            )
    return options
