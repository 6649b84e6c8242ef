"""What `test_devices.py` runs in a process of its own that has eight devices: prints, as JSON,
how far results are from those of one device, and what memory a device needs."""

import json
import sys
import tempfile
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lib import devices, flow_matching, gd, gmm, mmd, networks, runs
from lib.gmm.em import fit
from lib.networks import classification, optimizers
from lib.rff import gaussian_frequencies, uniform_phases
from lib.rows import Rows
from lib.rows.fourier_means import stream_mean_embeddings
from lib.sliced_wasserstein import random_directions
from xp_dataset_distillation import condense, config, objectives
from xp_drmmd import flows
from xp_drmmd.config import FlowConfig
from xp_gmm_source.sources import Gaussian
from xp_transfer_learning.otdd import otdd_value_and_grad
from xp_transfer_learning.product_kernel import product_value_and_grad

MESH = devices.device_mesh()
LABELLED = {"mmd_product": product_value_and_grad, "otdd": otdd_value_and_grad}
ALL = "all" in sys.argv
FOUND: dict = {"devices": MESH.size} | ({"devices, all": MESH.size} if ALL else {})


def cases(*listed):
    """All of them, or the first, which is compiled in a few seconds."""
    return listed if ALL else listed[:1]


def difference(one, other) -> float:
    """The largest difference of two trees, relative to their largest entry."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    pairs = [tuple(np.asarray(devices.fetch(leaf), np.float64) for leaf in pair) for pair in pairs]
    return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(a).max() for a, _ in pairs)


def on_both(function):
    """What `function` of a mesh returns without one and on eight devices."""
    return function(None), function(MESH)


def temporaries(make, *arguments) -> float:
    """The temporary memory of `make(mesh=mesh)` on a device of eight, relative to a single one."""

    def size(mesh):
        placed = devices.device_put(arguments, mesh)
        lowered = jax.jit(make(mesh=mesh)).lower(*placed)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one, eight = on_both(size)
    return eight / one


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rows():
    """`over_devices`, also where rows are filled up, with its gradient."""

    def function(scale, x, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return scale * jnp.sin(x) + noise, jnp.sum(x**3, axis=1)

    def total(mesh, scale, x, keys):
        values, cubes = devices.over_devices(function, mesh, replicated=1)(scale, x, keys)
        return jnp.sum(values**2) + jnp.sum(cubes), (values, cubes)

    for count in cases(5, 1, 16):
        x, keys = normal(count, count, 3), jax.random.split(jax.random.key(7), count)

        def slope(mesh, x=x, keys=keys):
            value_and_grad = jax.value_and_grad(partial(total, mesh), (0, 1), has_aux=True)
            return jax.jit(value_and_grad)(2.0, x, keys)

        FOUND[f"rows, {count}"] = difference(*on_both(slope))


def flow(start, target, num_epochs, mesh, num_directions=20, run=None, **options):
    function = mmd.target_value_and_grad(
        mmd.sliced_riesz(), num_directions=num_directions, mesh=mesh
    )
    options |= {"lr": 0.1, "m": 0.9, "run": run, "show_progress": False, "mesh": mesh}
    return gd.wasserstein_gradient_descent(
        start, target, function, jax.random.key(4), num_epochs, **options
    )


def rectangles():
    for shape in ((10, 1), (10, 4), (3, 8), (8, 6)):
        FOUND[f"grid {shape}"] = [*devices.grid(MESH, *shape, ("a", "b")).devices.shape]


def sliced():
    """The WoW gradient, with fewer directions than devices too, and flows in `lib.gd` of particles
    that are divided along points, along classes, and not at all."""
    x, y = normal(0, 5, 16, 9), 1 + normal(1, 4, 11, 9)
    for count, block_size in cases((101, None), (5, None), (64, 3)):
        options = {"num_directions": count, "block_size": block_size}

        def gradient(mesh, options=options):
            function = mmd.target_value_and_grad(mmd.sliced_laplace(0.5), mesh=mesh, **options)
            return jax.jit(function)(x, y, jax.random.key(2))

        FOUND[f"WoW gradient, {count} directions"] = difference(*on_both(gradient))
    if not ALL:
        return
    w = jax.random.uniform(jax.random.key(8), (5, 16))
    for count, weights in cases((5, None), (101, w)):

        def energy(mesh, count=count, weights=weights):
            directions = random_directions(jax.random.key(2), count, 9)
            z = normal(9, 5, 11, 9)
            function = partial(mmd.sliced_energy_value_and_grad, mesh=mesh, block_size=3)
            return jax.jit(function)(x, z, directions, x_weights=weights)

        FOUND[f"energy gradient, {count} directions"] = difference(*on_both(energy))
    for shape in cases((5, 16, 9), (8, 11, 9), (3, 5, 9)):
        run = partial(flow, normal(3, *shape), y, 12, num_directions=40, record_every=5)
        FOUND[f"flow of {shape}"] = difference(*on_both(lambda mesh, run=run: run(mesh=mesh)))


def labelled():
    """OTDD, its classes by pairs and points by rows, and the product kernel by rows."""
    x, y = normal(12, 3, 16, 9), 1 + normal(13, 4, 5, 9)
    for method in cases("mmd_product", "otdd"):

        def gradient(mesh, method=method):
            return jax.jit(partial(LABELLED[method], mesh=mesh))(x, y, jax.random.key(2))

        FOUND[f"labelled, {method}"] = difference(*on_both(gradient))


def resumed():
    """A flow saved on eight devices ends on one as if it had never left it, to rounding."""
    ends = normal(5, 2, 8, 3), normal(6, 2, 8, 3)
    with tempfile.TemporaryDirectory() as folder:
        run = runs.open_run(folder, "test", "flow", {}, seed=0)
        flow(*ends, 6, MESH, run=run)
        whole = flow(*ends, 12, None)
        FOUND["resumed on one device"] = difference(whole, flow(*ends, 12, None, run=run))


def drmmd():
    target = normal(8, 30, 2)
    for name in cases("drmmd", "kale", "mmd", "svgd"):
        settings = FlowConfig(
            flow=name, source_particle_num=40, bandwidth=0.5, adaptive="paper", num_steps=20
        )
        log_density = (lambda z: -jnp.sum(z**2) / 2) if name == "svgd" else None
        prepared = flows.prepare(settings, target)
        objective = flows.objective(settings, log_density)
        options = {"n_epochs": 20, "optimizer": flows.optimizer(settings), "show_progress": False}
        options |= {"carry": flows.first_memory(prepared)}
        arguments = 0.1 * normal(9, 1, 40, 2), prepared, objective, jax.random.key(1)
        one, eight = (
            gd.wasserstein_gradient_descent(*arguments, **options, mesh=mesh).particles
            for mesh in (None, MESH)
        )
        FOUND[f"xp_drmmd, {name}"] = difference(one, eight)


def condensation():
    base = config.CondenseConfig("digits", width=8, depth=2, num_per_class=40, real_batch=16)
    named = cases(
        ("four networks", replace(base, num_networks=4, class_chunk=1)),
        ("one network", base),
        ("mmdsw", config.mmdsw(base)),
        ("kept features", replace(base, num_networks=2, steps_per_batch=5, class_chunk=1)),
    )
    for name, settings in named:
        settings = replace(settings, real_batch=16)
        posed = condense.problem(settings, None)
        keys = jax.random.split(jax.random.key(0), 3)
        x = condense.start(keys[0], settings, posed.real)
        x = jnp.asarray(x).reshape(*x.shape[:2], -1)
        carry = objectives.first_carry(settings, posed.setting)
        target = objectives.Target(posed.real, jax.random.key_data(keys[1]))
        arguments = x, target, keys[2], carry

        def compiled(mesh, settings=settings, posed=posed, arguments=arguments):
            function = objectives.objective(settings, posed.setting, mesh)
            placed = devices.device_put(arguments, mesh)
            program = jax.jit(function).lower(*placed).compile()
            return program(*placed)[:2], program.memory_analysis().temp_size_in_bytes

        (one, whole), (eight, share) = on_both(compiled)
        FOUND[f"condensation, {name}"] = difference(one, eight)
        FOUND[f"memory: condensation, {name}"] = share / whole


def classifiers():
    network = networks.ConvNet(3, width=4, depth=2)
    listed = ("at once", (), True), ("in turn", (), False), ("sets", (3,), True)
    options = {"optimizer": optimizers.sgd(0.01, momentum=0.9), "num_epochs": 2, "batch_size": 8}
    fit = partial(classification.fit_seeds, show_progress=False, **options)
    for name, sets, at_once in cases(*listed):
        images = normal(10, *sets, 20, 8, 8, 1)
        labels = jax.random.randint(jax.random.key(1), (*sets, 20), 0, 3)
        arguments = jax.random.split(jax.random.key(3), 5), network, images, labels
        one, eight = (fit(*arguments, at_once=at_once, mesh=mesh) for mesh in (None, MESH))
        FOUND[f"classifiers, {name}"] = difference(one, eight)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, times):
        rows = jnp.concatenate([x.reshape(len(x), -1), times[:, None]], axis=1)
        return nn.Dense(16)(nn.tanh(nn.Dense(8)(rows))).reshape(x.shape)


def matching():
    images = jnp.clip(normal(11, 40, 4, 4, 1), -1, 1)
    arguments = jax.random.key(1), Network(), Gaussian(jnp.ones(16)), images
    options = {"optimizer": optax.sgd(0.1), "num_steps": 10, "batch_size": 30}
    fit = partial(flow_matching.fit, *arguments, show_progress=False, **options)
    for coupling in cases("optimal", "independent"):
        one, eight = (fit(coupling=coupling, mesh=mesh) for mesh in (None, MESH))
        FOUND[f"flow matching, {coupling}"] = difference(one, eight)


def streams():
    """EM and mean embeddings of rows that are read in chunks: on one device, on some, on all."""
    x = np.random.default_rng(0).normal(size=(101, 4)) + np.arange(101)[:, None] % 3
    start = gmm.Mixture(np.array([0.4, 0.6]), x[:2], gmm.from_matrices(np.stack([np.eye(4)] * 2)))
    rows, key = np.random.default_rng(0).normal(size=(1413, 8)), jax.random.key(2)
    options = {"num_blocks": 5, "block_key": key, "phases": uniform_phases(key, 20)}
    arguments, results = (rows, gaussian_frequencies(key, 20, 8), [1.0, 3.0]), []
    # A device compiles programs of its own.
    for count in (1, 3, 8) if ALL else (1, 3):
        some = jax.devices()[-count:]
        data = Rows(x, dtype=np.float64, chunk_size=40, devices=some)
        result = fit(data, start, tolerance=0.0, max_iterations=4, show_progress=False)
        means = stream_mean_embeddings(*arguments, devices=some, chunk_size=700, **options)
        results.append((result.log_likelihoods, means.block_sums, means.block_sizes))
    for i, name in enumerate(("EM", "sums of features", "sizes of blocks")):
        one, *others = (np.asarray(arrays[i]) for arrays in results)
        scale = np.abs(one).max() if name == "EM" else 1
        FOUND[f"streams, {name}"] = max(np.abs(other - one).max() for other in others) / scale


def memory():
    """What lies on a device beside the arguments: sliced-Wasserstein temporaries go with the
    directions, DrMMD's Gram matrices with the particles, costs and plans of OTDD with its rows."""
    x, make = normal(0, 10, 64, 16), partial(mmd.target_value_and_grad, mmd.sliced_riesz())
    many = partial(make, num_directions=2048)
    FOUND["memory: WoW gradient"] = temporaries(many, x, x + 1, jax.random.key(0))
    if not ALL:
        return
    otdd = partial(partial, otdd_value_and_grad)
    FOUND["memory: otdd"] = temporaries(otdd, normal(3, 8, 64, 9), normal(4, 8, 50, 9))
    settings = FlowConfig(flow="drmmd", source_particle_num=1600, bandwidth=0.3)
    prepared, start = flows.prepare(settings, normal(1, 400, 2)), normal(2, 1, 1600, 2)
    rest = prepared, jax.random.key(0), flows.first_memory(prepared)

    def size(mesh):
        spec = devices.partition_spec(start.shape, (-2, -3), mesh)
        placed = devices.device_put(start, mesh, spec), *devices.device_put(rest, mesh)
        program = jax.jit(flows.objective(settings)).lower(*placed).compile()
        return program.memory_analysis().temp_size_in_bytes

    one, eight = on_both(size)
    FOUND["memory: DrMMD"] = eight / one


if __name__ == "__main__":
    # In float32, except what is streamed.
    for part in (streams, *((condensation, classifiers, matching) if ALL else ())):
        part()
    with jax.enable_x64(True):
        few = (rows, rectangles, sliced, memory)
        for part in (*few, *((labelled, resumed, drmmd) if ALL else ())):
            part()
    print(json.dumps(FOUND))
