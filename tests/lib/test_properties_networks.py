"""Properties of networks and their training, at any scale of the images and in both dtypes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import slow
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads
from strategies import DECADES, DTYPES, SEEDS, few

from lib import networks
from lib.flow_matching import unet
from lib.flow_matching.unet import UNet, _Attention, _Norm, depth_to_space, space_to_depth
from lib.networks import classification, convolution

KEY = jax.random.key(0)

# Small ones of each kind, and the least images that they take; the first few are run, too.
NETWORKS = (
    (networks.MLP(3, hidden=(4,)), (1, 2, 1)),
    (networks.ConvNet(3, depth=1, width=4, convolution="patches"), (2, 5, 2)),
    (unet.UNet(width=4, multipliers=(1,), attention=(0,)), (5, 3, 1)),
    (networks.LeNet5(3), (12, 13, 1)),
    (networks.ConvNet(None, depth=2, width=4), (4, 4, 1)),
    (networks.AlexNet(3, widths=(4, 4, 4, 4, 4), convolution="patches"), (8, 8, 1)),
    (networks.VGG11(3, widths=((4,),) * 5), (32, 32, 1)),
    (networks.ResNet18(3, widths=(4, 6)), (9, 9, 1)),
    (unet.UNet(width=4, multipliers=(1, 2), attention=(1,)), (5, 3, 1)),
)
RUN = 3


def by_torch(x, kernel, stride):
    """The convolution, padded by half of the kernel's size."""
    x, kernel = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(kernel).permute(3, 2, 0, 1)
    value = torch.nn.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2)
    return value.permute(0, 2, 3, 1).numpy()


@partial(jax.jit, static_argnums=0)
def convolved(module, parameters, x, weights):
    value, pullback = jax.vjp(module.apply, parameters, x)
    return value, *pullback(weights)


@few(12)
@given(
    st.sampled_from([("patches", 3, 1), ("patches", 1, 2), ("xla", 3, 2)]),
    DTYPES,
    DECADES,
    st.booleans(),
    SEEDS,
)
def test_convolutions(case, dtype, exponent, conv, seed):
    """A sum of k^2 c products and a bias; the gradients are the transpose in each argument."""
    (method, size, stride), rng = case, np.random.default_rng(seed)
    on_cpu = jax.devices()[0].platform == "cpu"
    assert convolution.fastest() == ("patches" if on_cpu else "xla")
    module = (networks.Conv if conv else convolution.Convolution)(2, size, method, stride=stride)
    x = 10.0**exponent * rng.normal(size=(2, 5, 4, 3))
    x[1] = x[0] * (seed % 2)
    kernel, bias = rng.normal(size=(size, size, 3, 2)), rng.normal(size=2)
    rounded = [array.astype(dtype).astype(float) for array in (x, kernel)]
    value, terms = by_torch(*rounded, stride), by_torch(*map(np.abs, rounded), stride)
    weights = rng.normal(size=value.shape).astype(dtype)
    with jax.enable_x64(True):
        started = jax.eval_shape(module.init, KEY, jnp.asarray(x, dtype))["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(started)} == {np.dtype(np.float32)}
        leaves = {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(bias, dtype)}
        results = convolved(module, {"params": leaves}, jnp.asarray(x, dtype), jnp.asarray(weights))
        outputs, gradients, gradient = jax.tree.map(np.asarray, results)
    kernel, bias = kernel.astype(dtype).astype(float), bias.astype(dtype).astype(float)
    bound = (3 * size**2 + 4) * np.finfo(dtype).eps * (terms + np.abs(bias))
    for leaf in (outputs, gradient, *gradients["params"].values()):
        assert leaf.dtype == dtype
    assert np.all(np.abs(outputs - value - bias) <= bound)
    inner = np.sum(weights.astype(float) * value)
    slack = 4 * weights.size * np.finfo(dtype).eps * np.sum(np.abs(weights) * terms)
    assert abs(np.sum(gradient.astype(float) * x.astype(dtype)) - inner) <= slack
    assert abs(np.sum(gradients["params"]["kernel"].astype(float) * kernel) - inner) <= slack
    sums = weights.astype(float).sum(axis=(0, 1, 2))
    size = np.abs(weights).sum(axis=(0, 1, 2))
    assert np.all(
        np.abs(gradients["params"]["bias"] - sums) <= weights.size * np.finfo(dtype).eps * size
    )


def test_second_derivatives_of_the_convolution(x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 3, 3, 2)), rng.normal(size=(3, 3, 2, 2))
    module = convolution.Convolution(2)

    def value(x, kernel):
        return jnp.sum(
            jnp.sin(module.apply({"params": {"kernel": kernel, "bias": jnp.zeros(2)}}, x))
        )

    check_grads(jax.jit(value), (x, kernel), order=2, modes=("rev",), rtol=1e-5)


# Networks


@partial(jax.jit, static_argnums=0)
def applied(network, parameters, images, *rest):
    """Outputs, and a gradient in the images."""

    def total(images):
        outputs = network.apply(parameters, images, *rest)
        return jnp.sum(jnp.sin(outputs)), outputs

    gradient, outputs = jax.grad(total, has_aux=True)(images)
    return outputs, gradient


def inputs(network, images):
    times = np.linspace(0, 1, len(images)).astype(images.dtype)
    return (images, times) if isinstance(network, unet.UNet) else (images,)


@few(12)
@given(st.sampled_from(NETWORKS[:RUN]), DECADES, st.booleans(), SEEDS)
def test_networks_of_float32(case, exponent, constant, seed):
    """All is finite, also of images that are one color; equal ones have equal outputs."""
    (network, shape), rng = case, np.random.default_rng(seed)
    images = 10.0**exponent * rng.normal(size=(3, *shape))
    images[1:] = images[:1]
    images = (np.full_like(images, 10.0**exponent) if constant else images).astype(np.float32)
    with jax.enable_x64(True):
        arguments = inputs(network, images)
        if len(arguments) > 1:
            arguments = images, np.zeros(3, np.float32)
        shapes = jax.eval_shape(network.init, KEY, *arguments)
        parameters = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
        )
        results = applied(network, parameters, *map(jnp.asarray, arguments))
        results = jax.tree.map(np.asarray, results)
    for leaf in results:
        assert leaf.dtype == np.float32
        assert np.isfinite(leaf).all()
    outputs, gradient = results
    assert (gradient.shape, len(outputs)) == (images.shape, 3)
    scale = np.abs(outputs).max() + np.finfo(np.float32).tiny
    np.testing.assert_allclose(outputs[1:] / scale, outputs[:2] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [slow(np.float32), np.float64])
def test_networks_compute_in_the_dtype_of_images(dtype):
    """Parameters stay float32, as flax's own are."""
    with jax.enable_x64(True):
        for network, shape in NETWORKS:
            arguments = inputs(network, np.zeros((2, *shape), dtype))
            parameters = jax.eval_shape(network.init, KEY, *arguments)
            assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {np.dtype(np.float32)}
            assert jax.eval_shape(network.apply, parameters, *arguments).dtype == dtype


@pytest.mark.slow
def test_networks_by_name_compute_in_float32():
    with jax.enable_x64(True):
        for name in ("convnet", "mlp", "lenet", "alexnet", "vgg11", "resnet18"):
            network = networks.network_by_name(name, 7, (28, 28, 1), width=8)
            images = jax.ShapeDtypeStruct((2, 28, 28, 1), np.float32)
            parameters = jax.eval_shape(network.init, KEY, images)
            outputs = jax.eval_shape(network.apply, parameters, images)
            assert (outputs.shape, outputs.dtype) == ((2, 7), np.float32)


jit_sinusoids = jax.jit(unet.sinusoids, static_argnums=1)


@few(15)
@given(st.sampled_from([(1, 2), (5, 6)]), DTYPES, SEEDS)
def test_sinusoids(shape, dtype, seed):
    """An angle is off by the rounding of a power of 10,000, 2 log(10,000) + 4 of its own."""
    (n, dimension), rng = shape, np.random.default_rng(seed)
    times = rng.uniform(size=n).astype(dtype)
    times[0] = 0
    with jax.enable_x64(True):
        sinusoids = np.asarray(jit_sinusoids(jnp.asarray(times), dimension))
    half = dimension // 2
    angles = 1000 * times.astype(float)[:, None] / 10000.0 ** (np.arange(half) / half)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    eps = np.finfo(dtype).eps
    bound = (2 * np.log(1e4) + 4) * eps * np.concatenate([angles, angles], axis=1) + 2 * eps
    assert sinusoids.dtype == dtype
    assert np.all(np.abs(sinusoids - expected) <= bound)


@few(40)
@given(st.integers(1, 500), st.integers(1, 600))
def test_steps_per_epoch_are_the_batches_of_a_range(num_images, batch_size):
    batches = range(0, num_images, min(batch_size, num_images))
    assert classification.steps_per_epoch(num_images, batch_size) == len(batches)


# The U-Net


SMALL = {"width": 8, "multipliers": (1, 2)}


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@few(16)
@given(
    st.sampled_from([((1, 1, 1, 1), 1), ((2, 4, 6, 3), 2), ((1, 6, 3, 1), 3)]),
    st.sampled_from([np.float32, np.float64, np.float16]),
    SEEDS,
)
def test_pixels_become_channels_and_come_back(case, dtype, seed):
    (shape, factor), rng = case, np.random.default_rng(seed)
    images = rng.normal(size=shape).astype(dtype)
    n, height, width, channels = shape
    with jax.enable_x64(True):
        blocks = space_to_depth(jnp.asarray(images), factor)
        back = depth_to_space(blocks, factor)
        blocks, back = np.asarray(blocks), np.asarray(back)
    assert blocks.shape == (n, height // factor, width // factor, factor**2 * channels)
    split = images.reshape(n, height // factor, factor, width // factor, factor, channels)
    np.testing.assert_array_equal(blocks, split.swapaxes(2, 3).reshape(blocks.shape))
    assert blocks.dtype == back.dtype == dtype
    np.testing.assert_array_equal(back, images)


def test_blocks_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="5 x 4 images do not split into blocks of 2"):
        space_to_depth(jnp.zeros((1, 5, 4, 1)), 2)
    with pytest.raises(ValueError, match="6 channels do not hold blocks of 2 x 2"):
        depth_to_space(jnp.zeros((1, 2, 2, 6)), 2)


@pytest.mark.parametrize("channels", [slow(12), 16])
def test_norm_is_the_group_norm_of_flax(channels):
    x = 3 * normal(0, 3, 5, 4, channels) + 1
    parameters = {"params": {"scale": normal(1, channels), "bias": normal(2, channels)}}
    groups = {12: 4, 16: 8}[channels]
    expected = jax.jit(nn.GroupNorm(groups, epsilon=1e-5).apply)(parameters, x)
    np.testing.assert_allclose(jax.jit(_Norm().apply)(parameters, x), expected, atol=2e-5)
    scale, shift = normal(3, 3, channels), normal(4, 3, channels)
    moved = jax.jit(_Norm().apply)(parameters, x, scale, shift)
    expected = expected * (1 + scale)[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(moved, expected, atol=5e-5)


def test_attention_against_numpy():
    x = normal(0, 2, 3, 2, 64)
    parameters = _Attention().init(jax.random.key(1), x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, float), parameters["params"])
    y = np.asarray(_Norm().apply({"params": parameters["params"]["_Norm_0"]}, x), float)
    qkv = y.reshape(2, 6, 64) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    mixed = np.zeros((2, 6, 64))
    for head in range(2):
        q, k, v = (qkv[:, :, 64 * i + 32 * head :][:, :, :32] for i in range(3))
        logits = np.einsum("bqc,bkc->bqk", q, k) / np.sqrt(32)
        weights = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
        mixed[:, :, 32 * head : 32 * head + 32] = weights @ v
    expected = np.asarray(x) + (mixed @ p["Dense_1"]["kernel"]).reshape(x.shape)
    np.testing.assert_allclose(_Attention().apply(parameters, x), expected, atol=2e-5)


def drawn_parameters(network, images, times):
    """Parameters of the network's shapes, none of them 0."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images, times)
    return jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype("f"), shapes)


def test_velocities_have_the_images_shape():
    for shape, settings in (
        ((8, 8, 1), {}),
        ((28, 28, 1), {"patch": 2}),
        ((32, 32, 3), {"patch": 2, "multipliers": (1, 2, 2), "attention": (2,)}),
        ((7, 5, 2), {"patch": 2, "multipliers": (1, 2, 3), "blocks": 2}),
        ((1, 2, 1), {"attention": (0, 1)}),
    ):
        network, images, times = UNet(**SMALL | settings), jnp.zeros((3, *shape)), jnp.zeros(3)
        out, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), images, times)
        assert out.shape == images.shape


@pytest.mark.slow
def test_gradient_reaches_every_parameter():
    """Groups of the norms hold two channels: with one, a channel's bias before its norm is lost."""
    network = UNet(width=16, patch=2, attention=(1,))
    images, times = normal(0, 2, 7, 5, 2), jnp.array([0.2, 0.7])
    parameters = drawn_parameters(network, images, times)

    def objective(parameters):
        return jnp.sum((network.apply(parameters, images, times) - images) ** 2)

    gradient = jax.jit(jax.grad(objective))(parameters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 1e-5, jax.tree_util.keystr(path)


def test_images_do_not_meet_times_count_and_convolutions_agree():
    images, times = normal(0, 3, 8, 8, 1), jnp.array([0.2, 0.7, 0.7])
    networks = [UNet(**SMALL, convolution=method) for method in ("patches", "xla")]
    parameters = drawn_parameters(networks[0], images, times)
    apply, apply_xla = (jax.jit(network.apply) for network in networks)
    out = apply(parameters, images, times)
    scale = np.abs(out).max()
    np.testing.assert_allclose(apply_xla(parameters, images, times), out, atol=1e-5 * scale)
    other = apply(parameters, images.at[0].add(1.0), times.at[0].set(0.9))
    np.testing.assert_allclose(other[1:], out[1:], atol=1e-5 * scale)
    same = apply(parameters, images[:1].repeat(3, axis=0), times)
    np.testing.assert_allclose(same[1], same[2], atol=1e-5 * scale)
    assert np.abs(same[0] - same[1]).max() > 1e-2 * scale


def test_bad_settings_raise():
    for settings, message in (
        ({"multipliers": ()}, "multipliers must be"),
        ({"width": 7}, "width must be even"),
        ({"blocks": 0}, "blocks and patch"),
        ({"patch": 0}, "blocks and patch"),
        ({"attention": (2,)}, r"attention \(2,\) names levels other than 0 to 1"),
    ):
        network = UNet(**SMALL | settings)
        with pytest.raises(ValueError, match=message):
            network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))
