"""Condensation: the objective against loops, the joint step against the published one, runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from chunks import stop_after
from condensing import SMALL
from PIL import Image

from lib import augment, devices
from lib.runs.console import Interrupted
from xp_dataset_distillation import condense, config, losses, objectives
from xp_dataset_distillation.config import CondenseConfig
from xp_dataset_distillation.factor import decode
from xp_dataset_distillation.real_data import Setting, draw_batch


@pytest.fixture(scope="module")
def digits():
    return condense.problem(SMALL, None)


def arguments_of(settings: CondenseConfig, digits, *, step=0):
    """x [classes, n, d], target, key and step."""
    x = condense.start(jax.random.key(1), settings, digits.real)
    target = objectives.Target(
        jax.tree.map(jnp.asarray, digits.real), jax.random.key_data(jax.random.key(2))
    )
    return jnp.asarray(x.reshape(*x.shape[:2], -1)), target, jax.random.key(3), jnp.asarray(step)


def evaluated(settings: CondenseConfig, digits, mesh=None, *, step=0):
    """(loss, gradient)."""
    function = jax.jit(objectives.objective(settings, digits.setting, mesh))
    loss, gradient, following = function(*arguments_of(settings, digits, step=step))
    assert int(following) == step + 1
    return loss, np.asarray(gradient)


def assert_close(pair, expected, tolerance, *, of_largest, atol=0.0):
    """Losses, and gradients up to a share of the largest."""
    np.testing.assert_allclose(pair[0], expected[0], rtol=tolerance, atol=atol)
    scale = np.abs(expected[1]).max()
    np.testing.assert_allclose(pair[1], expected[1], atol=of_largest * scale)


@pytest.mark.parametrize(
    "settings",
    [
        replace(SMALL, num_networks=2, factor=2, start="mixed"),
        slow(replace(SMALL, num_networks=2, networks_at_once=True)),
        slow(replace(SMALL, kernel="linear", augmentation="color_crop_cutout")),
        replace(SMALL, space="pixels", kernel="energy"),
    ],
)
def test_the_objective_is_a_loop_over_classes_and_networks(settings, digits):
    mean, std = digits.setting.mean[0], digits.setting.std[0]
    x, target, key, _ = arguments_of(settings, digits)
    batch_key, change_key, loss_key, _ = jax.random.split(key, 4)
    real = draw_batch(batch_key, target.real, settings.real_batch) / np.float32(255)
    network_key = jax.random.fold_in(jax.random.key(2), 7 // settings.steps_per_network)
    augmentation = augment.parse(settings.augmentation, dialect="idc", flips=False)
    class_loss = losses.class_loss(settings.kernel)
    network = None
    if settings.space == "features":
        network = objectives.network_of(settings, digits.setting)

    def features(images, network_key):
        if network is None:
            return images.reshape(len(images), -1)
        parameters = network.init(network_key, jnp.zeros((1, 8, 8, 1)))
        return network.apply(parameters, (images - mean) / std)

    @jax.jit
    @jax.value_and_grad
    def of_class(x, real, change_key, loss_key, network_key):
        """The loss of one class under one network."""
        change = augment.draw(change_key, augmentation, None)
        pair = decode(x.reshape(-1, 8, 8, 1), settings.factor), real
        pair = [features(augment.apply(change, images), network_key) for images in pair]
        return class_loss(loss_key, *pair)

    classes = list(zip(x, real, jax.random.split(change_key, 10), jax.random.split(loss_key, 10)))
    pairs = [
        [of_class(*arguments, seed) for arguments in classes]
        for seed in jax.random.split(network_key, settings.num_networks)
    ]
    value = np.mean([sum(value for value, _ in row) for row in pairs])
    gradient = np.mean([np.stack([g for _, g in row]) for row in pairs], axis=0)
    pair = evaluated(settings, digits, step=7)
    assert_close(pair, (value, gradient), 1e-4, of_largest=2e-4, atol=1e-6)


def test_neither_a_mesh_of_one_device_nor_chunks_of_classes_change_more_than_rounding(digits):
    settings = replace(SMALL, space="pixels", kernel="linear")
    whole = evaluated(settings, digits)
    on_mesh = evaluated(settings, digits, devices.device_mesh(1))
    jax.tree.map(np.testing.assert_array_equal, whole, on_mesh)
    # 2 at a time: the largest divisor of 10.
    in_chunks = evaluated(replace(settings, class_chunk=3), digits)
    assert_close(in_chunks, whole, 1e-5, of_largest=1e-5)


def test_at_most_so_many_decoded_images_are_used(digits):
    settings = replace(SMALL, images_per_class=5, factor=2, most_decoded=8, start="noise")
    _, gradient = evaluated(settings, digits)
    moved = (np.abs(gradient) > 0).any(axis=2)
    np.testing.assert_array_equal(moved.sum(axis=1), 2)
    assert len({tuple(row) for row in moved}) > 1  # each class its own


@pytest.mark.slow
def test_mmdsw_compares_all_classes_at_once(digits):
    settings = replace(config.mmdsw(SMALL), augmentation="", num_directions=9, space="pixels")
    x, target, key, _ = arguments_of(settings, digits)
    batch_key, _, loss_key, _ = jax.random.split(key, 4)
    real = jnp.asarray(draw_batch(batch_key, target.real, 5), jnp.float32) / 255
    loss = jax.value_and_grad(losses.dataset_loss, argnums=1)
    expected = loss(loss_key, x, real.reshape(10, 5, -1), num_directions=9)
    assert_close(evaluated(settings, digits), expected, 1e-5, of_largest=1e-5)


def test_networks_stay_for_some_steps(digits):
    first, fifth, sixth = (evaluated(SMALL, digits, step=step)[0] for step in (0, 4, 5))
    assert first == fifth != sixth


def test_real_images_that_stay_are_those_of_the_first_of_their_steps(digits):
    settings = replace(SMALL, num_networks=2, class_chunk=5)
    fresh, kept = (
        jax.jit(objectives.objective(replace(settings, steps_per_batch=n), digits.setting))
        for n in (1, 5)
    )
    carry = objectives.first_carry(replace(settings, steps_per_batch=5), digits.setting)
    x, target, _, _ = arguments_of(settings, digits)
    for step in range(7):
        *found, carry = kept(x, target, jax.random.key(step), carry)
        expected = fresh(x, target, jax.random.key(step // 5 * 5), jnp.asarray(step))
        assert_close(found, expected, 1e-5, of_largest=1e-5)


@pytest.mark.parametrize("classes", [1, 3, 10])
def test_the_joint_step_is_the_published_loop_over_classes(classes):
    """Independent quadratics, one per class; the momentum of a class coasts through the turns of
    the others. Compared where a class is about to be differentiated again."""
    rng = np.random.default_rng(0)
    centers, start = rng.normal(size=(2, classes, 4))
    curvature = rng.uniform(0.5, 2, size=(classes, 1))
    settings = replace(SMALL, step_size=0.05, momentum=0.5, sequential=True)
    setting = Setting(classes, (8, 8, 1), (0.5,), (0.5,), flips=False)
    step_size, momentum = objectives.step_of(settings, setting)
    x, velocity = start, np.zeros_like(start)
    for _ in range(20):
        velocity = curvature * (x - centers) + momentum * velocity
        x = x - step_size * velocity

    published, buffer = start, np.zeros_like(start)
    for turn in range(21 * classes):
        c = turn % classes
        if turn >= 20 * classes:
            np.testing.assert_allclose(x[c], published[c], rtol=1e-12)
        buffer = 0.5 * buffer
        buffer[c] += (curvature * (published - centers))[c]
        published = published - 0.05 * buffer


def test_images_stay_in_the_unit_interval():
    optimizer = objectives.optimizer(1.0, 0.0)
    x = jnp.asarray([[0.2, 0.9]])
    updates, _ = optimizer.update(jnp.asarray([[0.5, -0.05]]), optimizer.init(x), x)
    np.testing.assert_allclose(x + updates, [[0.0, 0.95]], atol=1e-7)


def test_a_run_condenses_and_an_interrupted_one_ends_in_the_same_bits(tmp_path, monkeypatch):
    settings = replace(SMALL, num_steps=6, steps_per_batch=5)

    def arrays(results, seed=0):
        run = condense.condense(settings, seed=seed, results=results, show_progress=False)
        return run.load_arrays()

    folder = condense.main(condense.Arguments(**vars(settings), results=tmp_path / "a"))
    assert len(list(folder.glob("images/*/001.png"))) == 10
    for name in ("condensed.png", "along.png"):
        with Image.open(folder.parent / name) as image:
            assert min(image.size) > 100
    stored = arrays(tmp_path / "a")
    assert stored["images"].shape == (10, 2, 8, 8, 1)
    assert stored["losses"].shape == (6,)
    assert stored["losses"][-1] < stored["losses"][0]
    assert 0 <= stored["images"].min() <= stored["images"].max() <= 1
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            arrays(tmp_path / "b")
    for name, value in arrays(tmp_path / "b").items():
        if name != "seconds":
            np.testing.assert_array_equal(value, stored[name])
    assert not np.array_equal(arrays(tmp_path / "a", seed=1)["images"], stored["images"])


@pytest.mark.parametrize("start", ["real", "mixed", "noise"])
def test_starts(start, digits):
    settings = replace(SMALL, start=start, factor=2)
    images, again = (condense.start(jax.random.key(0), settings, digits.real) for _ in range(2))
    assert images.shape == (10, 2, 8, 8, 1)
    assert 0 <= images.min() <= images.max() <= 1
    np.testing.assert_array_equal(images, again)
    if start == "real":
        for label, of_class in enumerate(np.rint(images * 255).astype(np.uint8)):
            members = digits.real.images[digits.real.labels == label]
            assert {image.tobytes() for image in of_class} <= {row.tobytes() for row in members}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_class": 0}, "images_per_class must be at least 1"),
        ({"momentum": 1.0}, "momentum"),
        ({"step_size": -1.0}, "step_size must be positive"),
        ({"factor": 3, "most_decoded": 8}, "most_decoded 8"),
        ({"method": "mmdsw", "class_chunk": 2}, "class_chunk"),
        ({"held_out": -1}, "held_out"),
        ({"steps_per_batch": 2}, "2 does not divide steps_per_network 5"),
        ({"steps_per_batch": 5, "space": "pixels"}, "is of --space features"),
        # These do not fit the data.
        ({"images_per_class": 200}, "200"),
        ({"factor": 9}, "factor"),
        ({"dataset": "none"}, "none"),
    ],
)
def test_bad_settings_are_refused_before_any_work(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(condense, "objective", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        condense.condense(replace(SMALL, **changes), seed=0, results=tmp_path)
