"""Meshes of devices: where arrays lie, and functions sharded over devices.

JAX's own runtime does the work: arrays placed on a mesh, and `jax.shard_map` over axes whose parts
do not depend on each other. A mesh is an argument (`mesh=None`: one device) of every function of
`lib` that can use several devices; theirs may belong to several processes (`lib.runs.processes`).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import PyTree

AXIS = "devices"  # the one axis of a mesh


def device_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of the first `num_devices` devices of all processes, or of all there are.

    Raises ValueError where there are fewer, and where a process would be left without any.
    """
    present = jax.devices()
    wanted = len(present) if num_devices is None else num_devices
    if not 1 <= wanted <= len(present):
        some = f"{len(present)}: {present[0]}" + (f" to {present[-1]}" if len(present) > 1 else "")
        raise ValueError(f"{wanted} devices asked for, there are {some}; ask for as many, or fewer")
    chosen = present[:wanted]
    if {device.process_index for device in chosen} != set(range(jax.process_count())):
        raise ValueError(f"{wanted} devices leave one of {jax.process_count()} processes without")
    return Mesh(np.array(chosen), (AXIS,))


# ---- Where arrays lie


def sharding(mesh: Mesh | None, spec: Spec = Spec()) -> NamedSharding | None:  # noqa: B008
    """For `jnp.zeros(..., device=...)`; None is one device."""
    return None if mesh is None else NamedSharding(mesh, spec)


def device_put(tree: PyTree, mesh: Mesh | None, spec: Spec = Spec()) -> PyTree:  # noqa: B008
    """The arrays on the mesh: replicated on every device, or sharded as `spec` says.

    All processes must hold equal values; each hands over what its own devices need.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    where, many = NamedSharding(mesh, spec), mesh.is_multi_process

    def put(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if not many or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, where)
        leaf = np.asarray(leaf)
        leaf = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def constrain(tree: PyTree, mesh: Mesh | None, spec: Spec = Spec()) -> PyTree:  # noqa: B008
    """Inside jit: the arrays as `device_put` would put them. A loop whose results lie as its
    arguments did is compiled once."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def partition_spec(shape: Sequence[int], axes: Sequence[int], mesh: Mesh | None) -> Spec:
    """The spec that shards the first of `axes` that all devices can share equally, if any."""
    if mesh is None:
        return Spec()
    for axis in axes:
        if shape[axis] % mesh.size == 0:
            return Spec(*[AXIS if i == axis % len(shape) else None for i in range(len(shape))])
    return Spec()


def fetch(tree: PyTree) -> PyTree:
    """The arrays as NumPy's, on every process, wherever their parts lie."""

    def get(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(get, tree)


def gather(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """What was made on the mesh as whole arrays of this process, for what knows of no mesh."""
    return tree if mesh is None else jax.tree.map(jnp.asarray, fetch(tree))


def grid(mesh: Mesh, rows: int, columns: int, names: tuple[str, str]) -> Mesh:
    """The devices as a rectangle for rows x columns of equal work, chosen so that the busiest has
    least; every column of devices takes as many columns."""

    def busiest(across: int) -> tuple[int, int]:
        return -(-rows // (mesh.size // across)) * (columns // across), across

    possible = [k for k in range(1, mesh.size + 1) if mesh.size % k == 0 and columns % k == 0]
    return Mesh(mesh.devices.reshape(-1, min(possible, key=busiest)), names)


def over_devices(
    function: Callable,
    mesh: Mesh | None,
    *,
    replicated: int = 0,
    axis: str = AXIS,
    specs: tuple[Spec, ...] | None = None,
) -> Callable:
    """`function(*replicated arrays, *arrays)`, whose results have the arrays' leading axis, with
    that axis sharded over the devices of the mesh.

    The first `replicated` arguments go to every device as they are, or sharded as `specs` says. A
    leading axis that the devices cannot share equally is filled up with copies of its last row,
    whose results are cut off: the function must treat each row by itself. Of rows that they can
    share it may make one result per device, to be summed up. Differentiable.
    """
    if mesh is None:
        return function
    specs = specs or (Spec(),) * replicated

    def on_all(*arguments):
        shared, rows = arguments[:replicated], arguments[replicated:]
        count = jax.tree.leaves(rows)[0].shape[0]
        missing = -count % mesh.shape[axis]
        if missing:
            rows = jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[-1:]] * missing]), rows)
        in_specs = (*specs, *(Spec(axis),) * len(rows))
        results = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=Spec(axis), check_vma=False
        )(*shared, *rows)
        return jax.tree.map(lambda leaf: leaf[:count], results) if missing else results

    return on_all
