"""Condensation: the objective against loops, the joint step against the published one, runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from condensing import SMALL

from lib import augment, devices, gd
from lib.gd import DivergedError
from lib.runs.console import Interrupted
from xp_dataset_distillation import condense, config, losses, objectives
from xp_dataset_distillation.config import CondenseConfig
from xp_dataset_distillation.factor import decode
from xp_dataset_distillation.real_data import draw_batch


@pytest.fixture(scope="module")
def digits():
    return condense.problem(SMALL, None)


def setting(settings: CondenseConfig, digits):
    """(x [classes, n, d], target, objective's Setting)."""
    x = condense.start(jax.random.key(1), settings, digits.real)
    target = objectives.Target(
        jax.tree.map(jnp.asarray, digits.real), jax.random.key_data(jax.random.key(2))
    )
    return jnp.asarray(x.reshape(*x.shape[:2], -1)), target, digits.setting


# ---- The objective


@pytest.mark.parametrize(
    "settings",
    [
        replace(SMALL, num_networks=2, factor=2, start="mixed"),
        pytest.param(replace(SMALL, num_networks=2, networks_at_once=True), marks=pytest.mark.slow),
        replace(SMALL, kernel="linear", augmentation="color_crop_cutout"),
        replace(SMALL, space="pixels", kernel="energy"),
    ],
)
def test_the_objective_is_a_loop_over_classes_and_networks(settings, digits):
    x, target, about = setting(settings, digits)
    key, step = jax.random.key(3), jnp.asarray(7)
    value, gradient, following = jax.jit(objectives.objective(settings, about))(
        x, target, key, step
    )
    assert int(following) == 8

    batch_key, change_key, loss_key, _ = jax.random.split(key, 4)
    real = np.asarray(draw_batch(batch_key, target.real, settings.real_batch)) / np.float32(255)
    changes = jax.random.split(change_key, 10)
    keys = jax.random.split(loss_key, 10)
    network_key = jax.random.fold_in(jax.random.key(2), 7 // settings.iterations_per_network)
    augmentation = augment.parse(settings.augmentation, dialect="idc", flips=False)
    class_loss = losses.class_loss(settings.kernel)

    network = None if settings.space == "pixels" else objectives.feature_network(settings, about)

    @jax.jit
    @jax.value_and_grad
    def of_one(x, real, change_key, loss_key, network_key):
        """The loss of one class under one network."""
        change = augment.draw(change_key, augmentation, None)
        pair = [
            augment.apply(change, images)
            for images in (decode(x.reshape(-1, 8, 8, 1), settings.factor), real)
        ]
        if network is None:
            return class_loss(loss_key, *(images.reshape(len(images), -1) for images in pair))
        parameters = network.init(network_key, jnp.zeros((1, 8, 8, 1)))
        features = [
            network.apply(parameters, (images - about.mean[0]) / about.std[0]) for images in pair
        ]
        return class_loss(loss_key, *features)

    seeds = jax.random.split(network_key, settings.num_networks)
    found = [
        [of_one(x[c], jnp.asarray(real[c]), changes[c], keys[c], seed) for seed in seeds]
        for c in range(10)
    ]
    expected = sum(np.mean([value for value, _ in row]) for row in found)
    expected_gradient = np.stack([np.mean([g for _, g in row], axis=0) for row in found])
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    scale = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-4 * scale)


def test_a_mesh_of_one_device_changes_nothing(digits):
    settings = replace(SMALL, space="pixels", kernel="linear", augmentation="")
    x, target, about = setting(settings, digits)
    arguments = x, target, jax.random.key(3), jnp.asarray(0)
    found = [
        jax.jit(objectives.objective(settings, about, mesh))(*arguments)
        for mesh in (None, devices.device_mesh(1))
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_chunks_of_classes_change_rounding_alone(digits):
    x, target, about = setting(SMALL, digits)
    found = [
        jax.jit(objectives.objective(replace(SMALL, class_chunk=chunk), about))(
            x, target, jax.random.key(3), jnp.asarray(0)
        )
        for chunk in (None, 3)  # 2 at a time: the largest divisor of 10
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(
        found[0][1], found[1][1], atol=1e-5 * float(jnp.abs(found[0][1]).max())
    )


def test_at_most_so_many_decoded_images_are_used(digits):
    settings = replace(SMALL, images_per_class=5, factor=2, most_decoded=8, start="noise")
    x, target, about = setting(settings, digits)
    _, gradient, _ = jax.jit(objectives.objective(settings, about))(
        x, target, jax.random.key(3), jnp.asarray(0)
    )
    moved = (np.abs(np.asarray(gradient)) > 0).any(axis=2)
    np.testing.assert_array_equal(moved.sum(axis=1), 2)
    assert len({tuple(row) for row in moved}) > 1  # each class its own


def test_mmdsw_compares_all_classes_at_once(digits):
    settings = replace(config.mmdsw(SMALL), augmentation="", num_directions=9, space="pixels")
    x, target, about = setting(settings, digits)
    key = jax.random.key(3)
    value, gradient, _ = jax.jit(objectives.objective(settings, about))(
        x, target, key, jnp.asarray(0)
    )
    batch_key, _, loss_key, _ = jax.random.split(key, 4)
    real = jnp.asarray(draw_batch(batch_key, target.real, 5), jnp.float32) / 255
    expected, expected_gradient = jax.value_and_grad(
        lambda x: losses.dataset_loss(loss_key, x, real.reshape(10, 5, -1), num_directions=9)
    )(x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        gradient, expected_gradient, atol=1e-5 * float(jnp.abs(expected_gradient).max())
    )


def test_networks_stay_for_some_steps(digits):
    x, target, about = setting(SMALL, digits)
    value = jax.jit(objectives.objective(SMALL, about))
    values = [float(value(x, target, jax.random.key(3), jnp.asarray(t))[0]) for t in (0, 4, 5)]
    assert values[0] == values[1] != values[2]


# ---- The step


@pytest.mark.parametrize("classes", [1, 3, 10])
def test_the_joint_step_is_the_published_loop_over_classes(classes):
    """Independent quadratics, one a class; the momentum of a class coasts through the turns of the
    others. Compared where a class is about to be differentiated again."""
    rng = np.random.default_rng(0)
    centres, start = rng.normal(size=(2, classes, 4))
    curvature = rng.uniform(0.5, 2, size=(classes, 1))
    lr, m, iterations = 0.05, 0.5, 20
    settings = replace(SMALL, lr=lr, momentum=m, sequential=True)
    about = objectives.Setting(classes, (8, 8, 1), (0.5,), (0.5,), flips=False)
    step, momentum = objectives.step_of(settings, about)
    x, velocity = start, np.zeros_like(start)
    for _ in range(iterations):
        velocity = curvature * (x - centres) + momentum * velocity
        x = x - step * velocity

    published, buffer = start, np.zeros_like(start)
    for turn in range((iterations + 1) * classes):
        c = turn % classes
        if turn >= iterations * classes:
            np.testing.assert_allclose(x[c], published[c], rtol=1e-12)
        gradient = np.zeros_like(start)
        gradient[c] = (curvature * (published - centres))[c]
        buffer = gradient + m * buffer
        published = published - lr * buffer


def test_images_stay_in_the_unit_interval():
    optimizer = objectives.optimizer(1.0, 0.0)
    x = jnp.asarray([[0.2, 0.9]])
    updates, _ = optimizer.update(jnp.asarray([[0.5, -0.05]]), optimizer.init(x), x)
    np.testing.assert_allclose(x + updates, [[0.0, 0.95]], atol=1e-7)


# ---- Runs


def test_a_run_condenses_and_an_interrupted_one_ends_in_the_same_bits(tmp_path, monkeypatch):
    settings = replace(SMALL, iterations=6)
    whole = condense.condense(settings, seed=0, results=tmp_path / "a", show_progress=False)
    stored = whole.load_arrays()
    assert stored["images"].shape == (10, 2, 8, 8, 1)
    assert stored["losses"].shape == (6,)
    assert stored["losses"][-1] < stored["losses"][0]
    assert (stored["images"] >= 0).all()
    assert (stored["images"] <= 1).all()

    flags = iter([False, True])

    class Stop:
        def __enter__(self):
            return lambda: next(flags, True)

        def __exit__(self, *error):
            return False

    with monkeypatch.context() as patch:
        patch.setattr("lib.runs.loop.interruptible", Stop)
        patch.setattr(gd, "MAX_STEPS_BETWEEN_VISITS", 2)
        with pytest.raises(Interrupted):
            condense.condense(settings, seed=0, results=tmp_path / "b", show_progress=False)
    resumed = condense.condense(settings, seed=0, results=tmp_path / "b", show_progress=False)
    for name, value in resumed.load_arrays().items():
        if name != "seconds":
            np.testing.assert_array_equal(value, stored[name])
    other = condense.condense(settings, seed=1, results=tmp_path / "a", show_progress=False)
    assert not np.array_equal(other.load_arrays()["images"], stored["images"])


def test_a_loss_of_nan_stops_the_run(tmp_path, monkeypatch):
    def broken(settings, about, mesh=None):
        def value_and_grad(x, target, key, step):
            return jnp.sum(x) * jnp.nan, x, step + 1

        return value_and_grad

    monkeypatch.setattr(condense, "objective", broken)
    with pytest.raises(DivergedError, match="step 0"):
        condense.condense(SMALL, seed=0, results=tmp_path, show_progress=False)


@pytest.mark.parametrize("start", ["real", "mixed", "noise"])
def test_starts(start, digits):
    settings = replace(SMALL, start=start, factor=2)
    images = condense.start(jax.random.key(0), settings, digits.real)
    assert images.shape == (10, 2, 8, 8, 1)
    assert images.min() >= 0
    assert images.max() <= 1
    again = condense.start(jax.random.key(0), settings, digits.real)
    np.testing.assert_array_equal(images, again)
    if start == "real":
        train = digits.real.images.reshape(len(digits.real.images), -1)
        for c in range(10):
            first = digits.real.starts[c]
            own = {row.tobytes() for row in train[first : first + digits.real.counts[c]]}
            for image in images[c]:
                assert np.rint(image * 255).astype(np.uint8).tobytes() in own


# ---- Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_class": 0}, "images_per_class must be at least 1"),
        ({"momentum": 1.0}, "momentum"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"factor": 3, "most_decoded": 8}, "most_decoded 8"),
        ({"method": "mmdsw", "class_chunk": 2}, "class_chunk"),
        ({"held_out": -1}, "held_out"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_class": 200}, "200"),
        ({"factor": 9}, "factor"),
        ({"dataset": "no_such_folder"}, "no_such_folder"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused_before_any_work(changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        condense.condense(replace(SMALL, **changes), seed=0, results=tmp_path)
