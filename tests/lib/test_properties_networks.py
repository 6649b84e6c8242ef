"""Properties of networks and their training, at any scale of the images and in both dtypes."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from lib import networks
from lib.flow_matching import unet
from lib.networks import classification, convolution

DTYPES = st.sampled_from([np.float32, np.float64])
EXPONENTS = st.integers(-6, 6)
SEEDS = st.integers(0, 2**31)
KEY = jax.random.key(0)

# Small ones of each kind, and the least images that they take; the first few are run, too.
NETWORKS = (
    (networks.MLP(3, hidden=(4,)), (1, 2, 1)),
    (networks.ConvNet(3, depth=1, width=4, convolution="patches"), (2, 5, 2)),
    (unet.UNet(width=4, multipliers=(1,), attention=(0,)), (5, 3, 1)),
    (networks.LeNet5(3), (12, 13, 1)),
    (networks.ConvNet(None, depth=2, width=4, norm="layer"), (4, 4, 1)),
    (networks.AlexNet(3, widths=(4, 4, 4, 4, 4), convolution="patches"), (8, 8, 1)),
    (networks.VGG11(3, widths=((4,),) * 5), (32, 32, 1)),
    (networks.ResNet18(3, widths=(4, 6)), (9, 9, 1)),
    (unet.UNet(width=4, multipliers=(1, 2), attention=(1,)), (5, 3, 1)),
)
RUN = 3


def few(examples):
    return settings(max_examples=examples, deadline=None)


# Convolutions


def by_loops(x, kernel, stride):
    """The convolution, padded by half of the kernel's size, and the sum of absolute terms."""
    size, _, _, features = kernel.shape
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    rows, columns = range(0, height, stride), range(0, width, stride)
    value, terms = np.zeros((2, n, len(rows), len(columns), features))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            patch = padded[:, row : row + size, column : column + size]
            value[:, i, j] = np.einsum("nabc,abcf->nf", patch, kernel)
            terms[:, i, j] = np.einsum("nabc,abcf->nf", np.abs(patch), np.abs(kernel))
    return value, terms


@partial(jax.jit, static_argnums=0)
def convolved(module, parameters, x, weights):
    value, pullback = jax.vjp(module.apply, parameters, x)
    return value, *pullback(weights)


@few(12)
@given(
    st.sampled_from([("patches", 3, 1), ("patches", 1, 2), ("xla", 3, 2)]),
    DTYPES,
    EXPONENTS,
    st.booleans(),
    SEEDS,
)
def test_convolutions(case, dtype, exponent, conv, seed):
    """A sum of k^2 c products and a bias. The gradients are the transpose in each argument: their
    inner product with the argument is that of the value with the weights."""
    (method, size, stride), rng = case, np.random.default_rng(seed)
    on_cpu = jax.devices()[0].platform == "cpu"
    assert convolution.fastest() == ("patches" if on_cpu else "xla")
    assert convolution.networks_at_once() != on_cpu
    module = (networks.Conv if conv else convolution.Convolution)(2, size, method, stride=stride)
    x = 10.0**exponent * rng.normal(size=(2, 5, 4, 3))
    x[1] = x[0] * (seed % 2)
    kernel, bias = rng.normal(size=(size, size, 3, 2)), rng.normal(size=2)
    value, terms = by_loops(x.astype(dtype).astype(float), kernel.astype(dtype), stride)
    weights = rng.normal(size=value.shape).astype(dtype)
    with jax.enable_x64(True):
        started = jax.eval_shape(module.init, KEY, jnp.asarray(x, dtype))["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(started)} == {np.dtype(np.float32)}
        leaves = {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(bias, dtype)}
        found = convolved(module, {"params": leaves}, jnp.asarray(x, dtype), jnp.asarray(weights))
        found, gradients, gradient = jax.tree.map(np.asarray, found)
    kernel, bias = kernel.astype(dtype).astype(float), bias.astype(dtype).astype(float)
    bound = (3 * size**2 + 4) * np.finfo(dtype).eps * (terms + np.abs(bias))
    for leaf in (found, gradient, *gradients["params"].values()):
        assert leaf.dtype == dtype
    assert np.all(np.abs(found - value - bias) <= bound)
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
@given(st.sampled_from(NETWORKS[:RUN]), EXPONENTS, st.booleans(), SEEDS)
def test_networks_of_float32(case, exponent, constant, seed):
    """Under float64 float32 stays, and all is finite, also of images that are one color. Images do
    not see each other: equal ones have equal outputs, to rounding."""
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
        found = applied(network, parameters, *map(jnp.asarray, arguments))
        found = jax.tree.map(np.asarray, found)
    for leaf in found:
        assert leaf.dtype == np.float32
        assert np.isfinite(leaf).all()
    outputs, gradient = found
    assert gradient.shape == images.shape
    assert len(outputs) == 3
    scale = np.abs(outputs).max() + np.finfo(np.float32).tiny
    np.testing.assert_allclose(outputs[1:] / scale, outputs[:2] / scale, rtol=0, atol=1e-5)


def test_networks_compute_in_the_dtype_of_images():
    """Parameters stay float32, as flax's own are."""
    with jax.enable_x64(True):
        for (network, shape), dtype in product(NETWORKS, (np.float32, np.float64)):
            arguments = inputs(network, np.zeros((2, *shape), dtype))
            parameters = jax.eval_shape(network.init, KEY, *arguments)
            assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {np.dtype(np.float32)}
            assert jax.eval_shape(network.apply, parameters, *arguments).dtype == dtype
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
        found = np.asarray(jit_sinusoids(jnp.asarray(times), dimension))
    half = dimension // 2
    angles = 1000 * times.astype(float)[:, None] / 10000.0 ** (np.arange(half) / half)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    eps = np.finfo(dtype).eps
    bound = (2 * np.log(1e4) + 4) * eps * np.concatenate([angles, angles], axis=1) + 2 * eps
    assert found.dtype == dtype
    assert np.all(np.abs(found - expected) <= bound)


# Training


@few(40)
@given(st.integers(1, 500), st.integers(1, 600))
def test_steps_per_epoch_are_the_batches_of_a_range(num_images, batch_size):
    batches = range(0, num_images, min(batch_size, num_images))
    assert classification.steps_per_epoch(num_images, batch_size) == len(batches)
