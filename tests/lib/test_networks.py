"""Networks against torch's functions, in float64, with the same parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from cases import slow
from strategies import normal

from lib.networks import MLP, VGG11, AlexNet, ConvNet, LeNet5, ResNet18, network_by_name, torch_like
from lib.networks.optimizers import adam, adamw, sgd

x64 = pytest.mark.usefixtures("x64")


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


def assert_as_torch(network, function, shape, num_classes=4):
    """Logits and gradients, up to rounding on the scale of the largest entry: biases before a norm
    have gradient 0."""
    images, weights = normal(0, *shape), normal(1, shape[0], num_classes)
    parameters = random_parameters(network, images)
    results = value_and_gradients(network, parameters, images, weights)
    expected = by_torch(function, parameters, images, weights)
    assert results[0].shape == weights.shape
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for part, references in zip(results, expected):
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(references))
        for result, reference in zip(jax.tree.leaves(part), jax.tree.leaves(references)):
            assert result.dtype == jnp.float64
            np.testing.assert_allclose(result, reference, rtol=1e-10, atol=1e-13 * scale)


def mlp(parameters, x, num_hidden):
    x = flat(x)
    for i in range(num_hidden):
        x = F.relu(dense(x, parameters[f"Dense_{i}"]))
    return dense(x, parameters[f"Dense_{num_hidden}"])


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


def instance_norm(x, layer):
    return F.instance_norm(x, weight=layer["scale"], bias=layer["bias"], eps=1e-5)


def padded(x):
    return F.pad(x, (2, 2, 2, 2)) if x.shape[2:] == (28, 28) else x


def flat(x):
    return x.permute(0, 2, 3, 1).flatten(1)


def convnet(parameters, x, depth):
    x = padded(x)
    for i in range(depth):
        x = convolution(x, parameters[f"Conv_{i}"], 1)
        x = F.avg_pool2d(F.relu(instance_norm(x, parameters[f"GroupNorm_{i}"])), 2)
    return dense(flat(x), parameters["Dense_0"])


def alexnet(parameters, x):
    x = padded(x)
    for i, padding in enumerate((2, 2, 1, 1, 1)):
        x = F.relu(convolution(x, parameters[f"Conv_{i}"], padding))
        x = F.max_pool2d(x, 2) if i in (0, 1, 4) else x
    return dense(flat(x), parameters["Dense_0"])


def vgg(parameters, x, stages):
    x, i = padded(x), 0
    for layers in stages:
        for _ in range(layers):
            x = convolution(x, parameters[f"Conv_{i}"], 1)
            x, i = F.relu(instance_norm(x, parameters[f"GroupNorm_{i}"])), i + 1
        x = F.max_pool2d(x, 2)
    return dense(flat(x), parameters["Dense_0"])


def resnet(parameters, x, widths):
    numbers = iter(range(100))

    def layer(x, stride=1):
        i = next(numbers)
        kernel = parameters[f"Conv_{i}"]["kernel"].permute(3, 2, 0, 1)
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2)
        return instance_norm(x, parameters[f"GroupNorm_{i}"])

    x = F.relu(layer(x))
    for i in range(len(widths)):
        for stride in (1 if i == 0 else 2, 1):
            y = layer(F.relu(layer(x, stride)))
            x = F.relu(y + (x if x.shape == y.shape else layer(x, stride)))
    return dense(x.mean(dim=(2, 3)), parameters["Dense_0"])


# By name, for 32 x 32 x 3 and 28 x 28 x 1: numbers of what stands before the last layer, counted
# layer by layer (kernels, biases, scales and shifts), and of features.
SIZES = {
    "convnet": (299_520, 297_216, 2048),
    "mlp": (409_856, 116_992, 128),
    "lenet": (82_276, 60_856, 84),
    "alexnet": (1_841_472, 1_835_072, 3072),
    "vgg11": (9_225_984, 9_224_832, 512),
    "resnet18": (11_168_832, 11_167_680, 512),
}


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters_by_name(name):
    *counts, features = SIZES[name]
    for shape, count in zip(((32, 32, 3), (28, 28, 1)), counts):
        for classes, last in ((None, 0), (7, (features + 1) * 7)):
            network = network_by_name(name, classes, shape)
            parameters = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))
            assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == count + last
        bare = network_by_name(name, None, shape).init_with_output
        out, _ = jax.eval_shape(bare, jax.random.key(0), jnp.zeros((2, *shape)))
        assert out.shape == (2, features)


@x64
@pytest.mark.parametrize(
    ("first_kernel", "shape"), [(1, (3, 28, 28, 1)), (5, (2, 17, 22, 3)), slow(3, (1, 16, 19, 2))]
)
def test_lenet_and_its_gradients(first_kernel, shape):
    network = LeNet5(first_kernel=first_kernel)
    assert_as_torch(network, partial(lenet, padding=first_kernel // 2), shape, 10)


@x64
@pytest.mark.parametrize("hidden", [(), (7,), (7, 6)])
def test_mlp_and_its_gradients(hidden):
    network = MLP(num_classes=4, hidden=hidden)
    assert_as_torch(network, partial(mlp, num_hidden=len(hidden)), (5, 3, 4, 2))


@x64
@pytest.mark.parametrize(
    ("depth", "shape", "convolution"),
    [
        (3, (2, 28, 28, 1), None),
        (2, (3, 11, 14, 3), None),
        slow(1, (2, 5, 4, 3), None),
        (2, (2, 9, 8, 1), "patches"),
    ],
)
def test_convnet_and_its_gradients(depth, shape, convolution):
    options = {"convolution": convolution} if convolution else {}
    network = ConvNet(num_classes=4, width=6, depth=depth, **options)
    assert_as_torch(network, partial(convnet, depth=depth), shape)


@x64
@pytest.mark.parametrize(
    ("network", "function", "shape", "convolution"),
    [
        (ResNet18(4, widths=(2, 3)), partial(resnet, widths=(2, 3)), (2, 10, 9, 3), "patches"),
        (AlexNet(4, widths=(2, 3, 2, 3, 2)), alexnet, (2, 8, 9, 3), "xla"),
        (VGG11(4, widths=((2,), (3, 2))), partial(vgg, stages=(1, 2)), (1, 28, 28, 1), "patches"),
    ],
    ids=["resnet", "alexnet", "vgg"],
)
def test_deep_networks_and_their_gradients(network, function, shape, convolution):
    assert_as_torch(network.clone(convolution=convolution), function, shape)


@x64
@pytest.mark.parametrize(
    "network",
    [MLP(3, hidden=(5,)), slow(LeNet5(3)), ConvNet(3, depth=1, width=2)],
    ids=["mlp", "lenet", "convnet"],
)
def test_features_are_what_the_last_layer_takes(network):
    images = jnp.asarray(normal(0, 2, 12, 12, 1))
    parameters = random_parameters(network, images)
    features = jax.jit(network.clone(num_classes=None).apply)(parameters, images)
    layers = parameters["params"]
    last = layers[max(name for name in layers if name.startswith("Dense"))]
    expected = np.asarray(features) @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(network.apply(parameters, images), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("convnet", (8, 7, 1), "ConvNet of depth 3 needs images of at least 8 x 8.* 8 x 7"),
        ("lenet", (11, 12, 1), "LeNet5 needs .* 12 x 12, these have 11 x 12"),
        ("alexnet", (7, 8, 3), "AlexNet needs .* 8 x 8, these have 7 x 8"),
        ("vgg11", (31, 32, 3), "VGG11 needs .* 32 x 32, these have 31 x 32"),
        ("resnet18", (9, 8, 3), "ResNet18 needs .* 9 x 9, these have 9 x 8"),
        ("resnet34", (32, 32, 3), "no network 'resnet34'; there are convnet, mlp"),
    ],
)
def test_images_too_small_and_unknown_names_raise(name, shape, message):
    with pytest.raises(ValueError, match=message):
        network_by_name(name, 10, shape)
    if not message.startswith("no"):
        network = network_by_name(name, 10, (32, 32, shape[2]))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))


def test_initial_weights_are_uniform_as_those_of_torch():
    for shape, fan_in in (((3, 3, 32, 100), 9 * 32), ((300, 100), 300)):
        weights = np.asarray(torch_like(jax.random.key(0), shape))
        assert 0.999 < np.abs(weights).max() * np.sqrt(fan_in) <= 1
        np.testing.assert_allclose(weights.var() * 3 * fan_in, 1, rtol=0.02)


# Optimizers against the published formulas and torch's


def descents(optimizer, by_torch, x0, num_steps):
    """Paths [num_steps, d] from x0 on sum x^4 / 4 + x, by optax and by torch."""
    x, state, path = jnp.asarray(x0), optimizer.init(jnp.asarray(x0)), []
    point = torch.tensor(x0, requires_grad=True)
    step, expected = by_torch(point), []
    for _ in range(num_steps):
        updates, state = optimizer.update(x**3 + 1, state, x)
        x = optax.apply_updates(x, updates)
        point.grad = point.detach() ** 3 + 1
        step()
        path.append(np.asarray(x))
        expected.append(point.detach().numpy().copy())
    return np.stack(path), np.stack(expected)


@pytest.mark.parametrize(
    ("momentum", "weight_decay", "milestones"),
    [(0.0, 0.0, ()), (0.9, 0.3, ()), (0.9, 0.05, (2, 3)), (0.0, 0.1, (1,))],
)
def test_sgd_is_that_of_torch(x64, momentum, weight_decay, milestones):
    """5 epochs of 3 steps, torch's schedule stepping once per epoch."""
    settings = {"momentum": momentum, "weight_decay": weight_decay}
    optimizer = sgd(0.1, **settings, milestones=milestones, factor=0.2, steps_per_epoch=3)

    def by_torch(point):
        reference = torch.optim.SGD([point], lr=0.1, **settings)
        schedule = torch.optim.lr_scheduler.MultiStepLR(reference, milestones, gamma=0.2)
        done = 0

        def step():
            nonlocal done
            reference.step()
            done += 1
            if done % 3 == 0:
                schedule.step()

        return step

    path, expected = descents(optimizer, by_torch, np.array([1.0, -0.5, 0.2]), 15)
    np.testing.assert_allclose(path, expected, rtol=1e-12)


def test_optimizers_are_one_object_a_setting_and_milestones_increase():
    assert adam(0.1) is adam(0.1)
    assert adam(0.1) is not adam(0.2)
    assert sgd(0.1, momentum=0.9) is sgd(0.1, momentum=0.9)
    assert sgd(0.1, momentum=0.9) is not sgd(0.1, momentum=0.8)
    assert adamw(0.1) is adamw(0.1)
    assert adamw(0.1) is not adamw(0.1, weight_decay=0.2)
    for milestones in ((0,), (3, 3), (4, 2)):
        with pytest.raises(ValueError, match="milestones must be positive and increase"):
            sgd(0.1, milestones=milestones)


@pytest.mark.parametrize(
    ("optimizer", "reference", "options"),
    [
        (adam, torch.optim.Adam, {}),
        (adamw, torch.optim.AdamW, {}),
        (adamw, torch.optim.AdamW, {"weight_decay": 0.4}),
    ],
)
def test_adam_and_adamw_are_those_of_torch(x64, optimizer, reference, options):
    def by_torch(point):
        return reference([point], lr=0.05, **options).step

    path, expected = descents(optimizer(0.05, **options), by_torch, np.array([1.0, -0.5]), 8)
    np.testing.assert_allclose(path, expected, rtol=1e-12)
