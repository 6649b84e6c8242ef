"""Networks against torch's functions, in float64, with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax import lax

from lib.networks import MLP, ConvNet, LeNet5, _PatchConv, _pool, torch_like

x64 = pytest.mark.usefixtures("x64")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def random_parameters(network, images, seed=0):
    """Of the shapes of the network's, none at 0 or 1, where biases and scales start."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), images[:1])
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    scales = [np.prod(leaf.shape[:-1]) ** -0.5 for leaf in leaves]
    return tree.unflatten(
        [scale * rng.normal(size=leaf.shape) for scale, leaf in zip(scales, leaves)]
    )


def value_and_gradients(network, parameters, images, weights):
    """Logits, and the gradients of their sum with `weights` in parameters and images."""

    @jax.jit
    def run(parameters, images):
        logits, pullback = jax.vjp(network.apply, parameters, images)
        return logits, *pullback(jnp.asarray(weights))

    return run(parameters, jnp.asarray(images))


def by_torch(function, parameters, images, weights):
    """The same of `function(parameters, images)`, images as [N, channels, H, W]."""
    parameters = jax.tree.map(lambda leaf: torch.tensor(leaf, requires_grad=True), parameters)
    images = torch.tensor(images, requires_grad=True)
    logits = function(parameters["params"], images.permute(0, 3, 1, 2))
    (logits * torch.tensor(weights)).sum().backward()
    gradients = jax.tree.map(lambda leaf: leaf.grad.numpy(), parameters)
    return logits.detach().numpy(), gradients, images.grad.numpy()


def convolution(x, layer, padding):
    return F.conv2d(x, layer["kernel"].permute(3, 2, 0, 1), layer["bias"], padding=padding)


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def lenet(parameters, x, padding):
    x = F.avg_pool2d(F.relu(convolution(x, parameters["_PatchConv_0"], padding)), 2)
    x = F.avg_pool2d(F.relu(convolution(x, parameters["_PatchConv_1"], 0)), 2)
    x = F.relu(dense(x.flatten(1), parameters["Dense_0"]))
    return dense(F.relu(dense(x, parameters["Dense_1"])), parameters["Dense_2"])


def convnet(parameters, x, depth, norm):
    if x.shape[2:] == (28, 28):
        x = F.pad(x, (2, 2, 2, 2))
    for i in range(depth):
        x = convolution(x, parameters[f"Conv_{i}"], 1)
        if norm == "instance":
            layer = parameters[f"GroupNorm_{i}"]
            x = F.instance_norm(x, weight=layer["scale"], bias=layer["bias"], eps=1e-5)
        x = F.avg_pool2d(F.relu(x), 2)
    return dense(x.permute(0, 2, 3, 1).flatten(1), parameters["Dense_0"])


def assert_same(results, expected):
    """Up to rounding on the scale of the largest entry: biases before a norm have gradient 0."""
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for part, references in zip(results, expected):
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(references))
        for result, reference in zip(jax.tree.leaves(part), jax.tree.leaves(references)):
            assert result.dtype == jnp.float64
            np.testing.assert_allclose(result, reference, rtol=1e-10, atol=1e-13 * scale)


@pytest.mark.parametrize(
    ("network", "shape", "count"),
    [
        (LeNet5(), (28, 28, 1), 61_562),
        (LeNet5(first_kernel=5), (28, 28, 1), 61_706),
        (LeNet5(num_classes=3), (28, 28, 1), 61_562 - 7 * 85),
        (ConvNet(), (28, 28, 1), 317_706),
        (ConvNet(), (32, 32, 3), 320_010),
        (ConvNet(norm="none"), (32, 32, 3), 320_010 - 3 * 2 * 128),
    ],
)
def test_number_of_parameters(network, shape, count):
    parameters = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == count


@x64
@pytest.mark.parametrize(
    ("shape", "size", "padding"),
    [((2, 7, 6, 3), 5, 2), ((1, 5, 5, 2), 5, 0), ((4, 6, 9, 1), 1, 0), ((2, 6, 5, 2), 2, 0)],
)
def test_patch_convolution_is_that_of_xla(shape, size, padding):
    images, layer = normal(0, *shape), _PatchConv(4, size, padding)
    x = jnp.asarray(images.transpose(3, 1, 2, 0))
    parameters = {
        "params": {"kernel": normal(1, size, size, shape[3], 4), "bias": normal(2, 4)},
    }

    def xla(parameters, x):
        kernel, bias = parameters["params"]["kernel"], parameters["params"]["bias"]
        names = ("CHWN", "HWIO", "CHWN")
        product = lax.conv_general_dilated(
            x, jnp.asarray(kernel), (1, 1), [(padding, padding)] * 2, dimension_numbers=names
        )
        return product + bias[:, None, None, None]

    def run(function):
        value, pullback = jax.vjp(function, parameters, x)
        return value, pullback(jnp.asarray(normal(3, *value.shape)))

    results, expected = jax.jit(lambda: run(layer.apply))(), jax.jit(lambda: run(xla))()
    assert_same(results, expected)


@x64
@pytest.mark.parametrize("shape", [(3, 4, 6, 2), (1, 5, 7, 3), (2, 3, 2, 1)])
def test_pooling(shape):
    images = normal(0, *shape)
    pooled = _pool(jnp.asarray(images.transpose(3, 1, 2, 0)))
    expected = F.avg_pool2d(torch.tensor(images.transpose(0, 3, 1, 2)), 2).numpy()
    np.testing.assert_allclose(pooled.transpose(3, 0, 1, 2), expected, rtol=1e-14)


@x64
@pytest.mark.parametrize(
    ("first_kernel", "shape"), [(1, (3, 28, 28, 1)), (5, (2, 17, 22, 3)), (3, (1, 16, 19, 2))]
)
def test_lenet_and_its_gradients(first_kernel, shape):
    network, images, weights = LeNet5(first_kernel=first_kernel), normal(0, *shape), normal(1, 10)
    weights = np.tile(weights, (shape[0], 1)) * (1 + np.arange(shape[0]))[:, None]
    parameters = random_parameters(network, images)
    results = value_and_gradients(network, parameters, images, weights)
    expected = by_torch(
        lambda p, x: lenet(p, x, padding=first_kernel // 2), parameters, images, weights
    )
    assert results[0].shape == (shape[0], 10)
    assert_same(results, expected)


@x64
@pytest.mark.parametrize("hidden", [(), (7,), (7, 6)])
def test_mlp_and_its_gradients(hidden):
    network, images = MLP(num_classes=4, hidden=hidden), normal(0, 5, 3, 4, 2)
    weights, parameters = normal(1, 5, 4), random_parameters(network, images)

    def layers(p, x):
        x = x.permute(0, 2, 3, 1).flatten(1)
        for i in range(len(hidden)):
            x = F.relu(dense(x, p[f"Dense_{i}"]))
        return dense(x, p[f"Dense_{len(hidden)}"])

    results = value_and_gradients(network, parameters, images, weights)
    assert_same(results, by_torch(layers, parameters, images, weights))


@x64
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"depth": 3, "norm": "instance"}, (2, 28, 28, 1)),
        ({"depth": 2, "norm": "instance"}, (3, 11, 14, 3)),
        ({"depth": 2, "norm": "none"}, (1, 12, 9, 3)),
    ],
)
def test_convnet_and_its_gradients(options, shape):
    network, images = ConvNet(num_classes=4, width=6, **options), normal(0, *shape)
    weights, parameters = normal(1, shape[0], 4), random_parameters(network, images)
    results = value_and_gradients(network, parameters, images, weights)
    expected = by_torch(lambda p, x: convnet(p, x, **options), parameters, images, weights)
    assert_same(results, expected)


def test_initial_weights_are_uniform_as_those_of_torch():
    for shape, fan_in in (((3, 3, 32, 100), 9 * 32), ((300, 100), 300)):
        weights = np.asarray(torch_like(jax.random.key(0), shape))
        assert 0.999 < np.abs(weights).max() * np.sqrt(fan_in) <= 1
        np.testing.assert_allclose(weights.var() * 3 * fan_in, 1, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("network", [LeNet5(), ConvNet(depth=2, width=4)], ids=["lenet", "convnet"])
def test_an_ensemble_is_a_vmap(network):
    images, keys = (
        jnp.asarray(normal(0, 3, 16, 16, 1), jnp.float32),
        jax.random.split(jax.random.key(0), 2),
    )

    @jax.jit
    def together_and_alone(keys):
        ensemble = jax.vmap(lambda key: network.init(key, images))(keys)
        alone = [network.apply(network.init(key, images), images) for key in keys]
        return jax.vmap(network.apply, (0, None))(ensemble, images), jnp.stack(alone)

    logits, alone = together_and_alone(keys)
    assert logits.shape == (2, 3, 10)
    np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-6 * np.abs(alone).max())
    assert np.abs(logits[0] - logits[1]).max() > 0.01


@pytest.mark.parametrize("side", [11, 12, 13])
def test_lenet_takes_images_of_twelve_pixels_and_no_fewer(side):
    images = jnp.zeros((2, side, side + 3, 1))
    if side < LeNet5.SMALLEST:
        with pytest.raises(ValueError, match=f"these have {side} x {side + 3}"):
            LeNet5().init(jax.random.key(0), images)
    else:
        parameters = LeNet5().init(jax.random.key(0), images)
        assert LeNet5().apply(parameters, images).shape == (2, 10)
