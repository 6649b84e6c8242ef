"""What `tests/test_meshes.py` runs in a process of its own that has eight devices: prints, as JSON,
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

from lib import devices, flow_matching, gd, mmd, networks, runs
from lib.networks import classification, optimizers
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


def temporaries(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


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
        one, eight = (
            jax.jit(jax.value_and_grad(partial(total, mesh), (0, 1), has_aux=True))(2.0, x, keys)
            for mesh in (None, MESH)
        )
        FOUND[f"rows, {count}"] = difference(one, eight)


def rectangles():
    for shape in ((10, 1), (10, 4), (3, 8), (8, 6)):
        FOUND[f"grid {shape}"] = [*devices.grid(MESH, *shape, ("a", "b")).devices.shape]


def sliced():
    """The WoW gradient, with fewer directions than devices too, and flows in `lib.gd` of particles
    that are divided along points, along classes, and not at all."""
    x, y = normal(0, 5, 16, 9), 1 + normal(1, 4, 11, 9)
    for num_directions, block_size in cases((101, None), (5, None), (64, 3)):
        function = partial(
            mmd.target_value_and_grad,
            mmd.sliced_laplace(0.5),
            num_directions=num_directions,
            block_size=block_size,
        )
        one, eight = (
            jax.jit(function(mesh=mesh))(x, y, jax.random.key(2)) for mesh in (None, MESH)
        )
        FOUND[f"WoW gradient, {num_directions} directions"] = difference(one, eight)
    for shape in cases((5, 16, 9), (8, 11, 9), (3, 5, 9)):
        start, one = normal(3, *shape), None
        for mesh in (None, MESH):
            found = gd.wasserstein_gradient_descent(
                start,
                y,
                mmd.target_value_and_grad(mmd.sliced_riesz(), num_directions=40, mesh=mesh),
                jax.random.key(4),
                n_epochs=12,
                lr=0.5,
                m=0.9,
                record_every=5,
                show_progress=False,
                mesh=mesh,
            )
            FOUND[f"flow of {shape}"] = 0.0 if one is None else difference(one, found)
            one = found


def labelled():
    """The baselines between labelled sets: classes of OTDD by pairs, its points and those of the
    product kernel by rows."""
    x, y = normal(12, 3, 16, 9), 1 + normal(13, 4, 5, 9)
    for method in cases("mmd_product", "otdd"):
        one, eight = (
            jax.jit(partial(LABELLED[method], mesh=mesh))(x, y, jax.random.key(2))
            for mesh in (None, MESH)
        )
        FOUND[f"labelled, {method}"] = difference(one, eight)


def resumed():
    """A flow saved on eight devices ends on one as if it had never left it, to rounding."""

    def flow(run, mesh, n_epochs):
        return gd.wasserstein_gradient_descent(
            normal(5, 2, 8, 3),
            normal(6, 2, 8, 3),
            partial(mmd.target_value_and_grad_riesz, n_projs=20),
            jax.random.key(4),
            n_epochs=n_epochs,
            lr=0.1,
            m=0.9,
            run=run,
            show_progress=False,
            mesh=mesh,
        )

    with tempfile.TemporaryDirectory() as folder:
        run = runs.open_run(folder, "test", "flow", {}, seed=0)
        flow(run, MESH, 6)
        FOUND["resumed on one device"] = difference(flow(None, None, 12), flow(run, None, 12))


def drmmd():
    target = normal(8, 30, 2)
    for flow in cases("drmmd", "kale", "mmd", "svgd"):
        settings = FlowConfig(
            flow=flow, source_particle_num=40, bandwidth=0.5, adaptive="paper", step_num=20
        )
        log_density = (lambda z: -jnp.sum(z**2) / 2) if flow == "svgd" else None
        prepared = flows.prepare(settings, target)
        one, eight = (
            gd.wasserstein_gradient_descent(
                0.1 * normal(9, 1, 40, 2),
                prepared,
                flows.objective(settings, log_density),
                jax.random.key(1),
                n_epochs=20,
                optimizer=flows.optimizer(settings),
                carry=flows.first_memory(prepared),
                show_progress=False,
                mesh=mesh,
            )
            for mesh in (None, MESH)
        )
        FOUND[f"xp_drmmd, {flow}"] = difference(one.particles, eight.particles)


def condensation():
    base = config.CondenseConfig("digits", width=8, depth=2, num_per_class=40, real_batch=16)
    named = cases(
        ("four networks", replace(base, num_networks=4, class_chunk=1)),
        ("one network", base),
        ("mmdsw", config.mmdsw(base)),
    )
    for name, settings in named:
        settings = replace(settings, real_batch=16)
        posed = condense.problem(settings, None)
        keys = jax.random.split(jax.random.key(0), 3)
        x = condense.start(keys[0], settings, posed.real)
        x = jnp.asarray(x).reshape(*x.shape[:2], -1)
        target = objectives.Target(posed.real, jax.random.key_data(keys[1]))
        found = []
        for mesh in (None, MESH):
            function = objectives.objective(settings, posed.setting, mesh)
            arguments = devices.device_put((x, target, keys[2], np.int32(0)), mesh)
            compiled = jax.jit(function).lower(*arguments).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes
            found.append((compiled(*arguments)[:2], memory))
        FOUND[f"condensation, {name}"] = difference(found[0][0], found[1][0])
        FOUND[f"memory: condensation, {name}"] = found[1][1] / found[0][1]


def classifiers():
    network = networks.ConvNet(3, width=4, depth=2)
    listed = ("at once", (), True), ("in turn", (), False), ("sets", (3,), True)
    for name, sets, at_once in cases(*listed):
        images = normal(10, *sets, 20, 8, 8, 1)
        labels = jax.random.randint(jax.random.key(1), (*sets, 20), 0, 3)
        one, eight = (
            classification.fit_seeds(
                jax.random.split(jax.random.key(3), 5),
                network,
                images,
                labels,
                optimizer=optimizers.sgd(0.01, momentum=0.9),
                num_epochs=2,
                batch_size=8,
                at_once=at_once,
                show_progress=False,
                mesh=mesh,
            )
            for mesh in (None, MESH)
        )
        FOUND[f"classifiers, {name}"] = difference(one, eight)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, times):
        rows = jnp.concatenate([x.reshape(len(x), -1), times[:, None]], axis=1)
        return nn.Dense(16)(nn.tanh(nn.Dense(8)(rows))).reshape(x.shape)


def matching():
    images = jnp.clip(normal(11, 40, 4, 4, 1), -1, 1)
    for coupling in cases("optimal", "independent"):
        one, eight = (
            flow_matching.fit(
                jax.random.key(1),
                Network(),
                Gaussian(jnp.ones(16)),
                images,
                optimizer=optax.sgd(0.1),
                num_steps=10,
                batch_size=30,
                coupling=coupling,
                show_progress=False,
                mesh=mesh,
            )
            for mesh in (None, MESH)
        )
        FOUND[f"flow matching, {coupling}"] = difference(one, eight)


def memory():
    """What lies on a device beside the arguments: sliced-Wasserstein temporaries go with the
    directions, DrMMD's Gram matrices with the particles, costs and plans of OTDD with its rows."""
    x = normal(0, 10, 200, 16)
    one, eight = (
        temporaries(
            mmd.target_value_and_grad(mmd.sliced_riesz(), num_directions=2048, mesh=mesh),
            *devices.device_put((x, x + 1, jax.random.key(0)), mesh),
        )
        for mesh in (None, MESH)
    )
    FOUND["memory: WoW gradient"] = eight / one
    if ALL:
        arguments = normal(3, 8, 64, 9), normal(4, 8, 50, 9)
        one, eight = (
            temporaries(
                partial(otdd_value_and_grad, mesh=mesh), *devices.device_put(arguments, mesh)
            )
            for mesh in (None, MESH)
        )
        FOUND["memory: otdd"] = eight / one
    settings = FlowConfig(flow="drmmd", source_particle_num=1600, bandwidth=0.3)
    prepared = flows.prepare(settings, normal(1, 400, 2))
    start = normal(2, 1, 1600, 2)
    one, eight = (
        temporaries(
            flows.objective(settings),
            devices.device_put(start, mesh, devices.partition_spec(start.shape, (-2, -3), mesh)),
            *devices.device_put((prepared, jax.random.key(0), flows.first_memory(prepared)), mesh),
        )
        for mesh in (None, MESH)
    )
    FOUND["memory: DrMMD"] = eight / one


if __name__ == "__main__":
    for part in (condensation, classifiers, matching) if ALL else ():  # in float32
        part()
    with jax.enable_x64(True):
        for part in (rows, rectangles, sliced, labelled, resumed, drmmd, memory):
            part()
    print(json.dumps(FOUND))
