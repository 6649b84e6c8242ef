"""Pools of trained networks: what they hold, and which network a step draws."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from condensing import SMALL

from lib import runs
from lib.networks import network_by_name
from xp_dataset_distillation import condense, objectives, pool
from xp_dataset_distillation.config import CondenseConfig
from xp_dataset_distillation.factor import decode

POOLED = replace(SMALL, networks="trained", pool_networks=3, pool_epochs=2, num_networks=2)
SHAPE = (8, 8, 1)
SIZE = {"width": SMALL.width, "depth": SMALL.depth}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    return folder, pool.train_pool(pool.pool_of(POOLED), results=folder, show_progress=False)


@partial(jax.jit, static_argnums=0)
def drawn(settings, parameters, step=0):
    """The networks of a step as vectors [networks, P]."""
    target = objectives.Target(None, jax.random.key_data(jax.random.key(2)), parameters)
    setting = condense.problem(SMALL, None).setting
    trees = objectives._draw_networks(target, step, settings, setting)
    return jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(trees)


def test_a_pool_holds_every_network_from_start_to_end(stored):
    """The start is a new network; losses fall."""
    _, arrays = stored
    network = network_by_name("convnet", 10, SHAPE, **SIZE)
    first = network.init(jax.random.split(jax.random.key(0), 3)[0], jnp.zeros((1, *SHAPE)))
    vector = jax.flatten_util.ravel_pytree(first)[0]
    assert arrays["parameters"].shape == (3, 3, len(vector))
    np.testing.assert_allclose(arrays["parameters"][0, 0], vector, rtol=1e-6)
    assert np.all(arrays["losses"][:, 1] < arrays["losses"][:, 0])
    assert len({vector.tobytes() for vector in arrays["parameters"].reshape(9, -1)}) == 9


def test_trained_networks_are_ends_and_aged_ones_any(stored):
    parameters = jnp.asarray(stored[1]["parameters"])
    for kind, known in (("trained", parameters[:, -1]), ("aged", parameters.reshape(9, -1))):
        settings = replace(POOLED, networks=kind, steps_per_network=1)
        of_steps = np.concatenate([drawn(settings, parameters, step) for step in range(30)])
        places = np.abs(of_steps[:, None] - np.asarray(known)[None]).max(axis=2)
        np.testing.assert_array_equal(places.min(axis=1), 0)
        assert set(places.argmin(axis=1)) == set(range(len(known)))


def test_interpolated_networks_lie_between_a_start_and_its_end(stored):
    parameters = jnp.asarray(stored[1]["parameters"])
    start, end = np.asarray(parameters[:, 0]), np.asarray(parameters[:, -1])
    for vector in np.asarray(drawn(replace(POOLED, networks="interpolated"), parameters)):
        way = end - start
        shares = np.einsum("np,np->n", vector[None] - start, way) / np.square(way).sum(axis=1)
        off = np.abs(start + shares[:, None] * way - vector[None]).max(axis=1)
        assert off.min() < 1e-5
        assert 0 <= shares[off.argmin()] <= 1


def test_networks_stay_for_their_steps(stored):
    parameters = jnp.asarray(stored[1]["parameters"])
    settings = replace(POOLED, networks="interpolated", steps_per_network=5)
    same, other = (drawn(settings, parameters, step) for step in (4, 5))
    np.testing.assert_array_equal(drawn(settings, parameters, 0), same)
    assert not np.array_equal(same, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "interpolated"])
def test_class_weight_adds_the_cross_entropy_of_the_condensed_images(stored, kind):
    """Images are decoded, normalized and classified here by the whole network, class by class."""
    digits = condense.problem(SMALL, None)
    settings = replace(POOLED, networks=kind, factor=2, class_weight=0.3)
    x = jnp.asarray(condense.start(jax.random.key(1), settings, digits.real))
    pool_of_networks = jnp.asarray(stored[1]["parameters"])
    key_data = jax.random.key_data(jax.random.key(2))
    target = objectives.Target(jax.tree.map(jnp.asarray, digits.real), key_data, pool_of_networks)
    arguments = x.reshape(10, 2, -1), target, jax.random.key(3), jnp.asarray(0)
    with_it, without = (
        objectives.objective(replace(settings, class_weight=weight), digits.setting)(*arguments)
        for weight in (0.3, 0.0)
    )
    networks = objectives._draw_networks(target, 0, settings, digits.setting)
    classify = jax.vmap(network_by_name("convnet", 10, SHAPE, **SIZE).apply, in_axes=(0, None))

    def cross_entropy(x):
        total = 0.0
        for label, images in enumerate(decode(x, 2)):
            logits = classify(networks, digits.setting.normalized(images))
            total -= jnp.mean(jax.nn.log_softmax(logits)[..., label])
        return total

    value, gradient = jax.value_and_grad(cross_entropy)(x)
    np.testing.assert_allclose(with_it[0] - without[0], 0.3 * value, rtol=1e-4)
    difference = (with_it[1] - without[1]).reshape(x.shape)
    np.testing.assert_allclose(difference, 0.3 * gradient, atol=1e-4 * np.abs(gradient).max())


@pytest.mark.slow
def test_condensations_share_a_pool(stored, monkeypatch):
    """Trained before: not again."""
    folder, _ = stored
    monkeypatch.setattr(pool.classification, "fit_seeds", None)
    options = {"results": folder, "show_progress": False}
    ends = [
        condense.condense(replace(POOLED, images_per_class=num, num_steps=2), seed=0, **options)
        for num in (1, 2)
    ]
    assert all(np.isfinite(run.load_arrays()["losses"]).all() for run in ends)


def test_without_a_pool_a_run_keeps_its_name():
    plain = CondenseConfig()
    exclude = (*runs.NOT_HASHED, *plain.without_effect())
    names = {
        runs.config_hash(replace(plain, pool_epochs=epochs), exclude=exclude) for epochs in (1, 5)
    }
    assert len(names) == 1
    aged = replace(plain, networks="aged")
    assert aged.without_effect() == ("steps_per_batch", "class_weight")
    assert replace(aged, class_weight=1.0, steps_per_batch=5).without_effect() == ()


def test_pixels_have_no_networks_and_random_ones_know_no_classes():
    with pytest.raises(ValueError, match=r"networks aged are of --space features"):
        CondenseConfig(networks="aged", space="pixels")
    for settings in ({"networks": "random"}, {"networks": "aged", "method": "mmdsw"}):
        with pytest.raises(ValueError, match=r"class_weight is of networks that know the classes"):
            CondenseConfig(**settings, class_weight=1.0)
