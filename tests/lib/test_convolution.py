"""Both methods of convolution against flax's, and the second derivatives of the faster."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lib.networks.convolution import Convolution


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize(
    ("channels", "features", "size", "stride"),
    [
        (3, 5, 3, 1),
        (5, 3, 3, 2),
        pytest.param(4, 4, 5, 1, marks=pytest.mark.slow),
        pytest.param(2, 3, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_convolution_and_its_gradients_are_those_of_flax(x64, channels, features, size, stride):
    x = normal(0, 2, 5, 4, channels, dtype=jnp.float64)
    target = normal(1, 2, -(-5 // stride), -(-4 // stride), features, dtype=jnp.float64)
    padding, use_bias = [(size // 2,) * 2] * 2, stride == 1
    reference = nn.Conv(
        features, (size, size), stride, padding, use_bias=use_bias, param_dtype=jnp.float64
    )
    parameters = reference.init(jax.random.key(2), x)
    if use_bias:
        parameters["params"]["bias"] = normal(3, features, dtype=jnp.float64)

    def objective(network):
        return lambda p, x: jnp.sum((network.apply(p, x) - target) ** 3)

    expected = jax.jit(jax.value_and_grad(objective(reference), (0, 1)))(parameters, x)
    for method in ("patches", "xla"):
        network = Convolution(features, size, method, stride=stride, use_bias=use_bias)
        result = jax.jit(jax.value_and_grad(objective(network), (0, 1)))(parameters, x)
        for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected)):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def test_second_derivatives_of_the_convolution(x64):
    x, kernel = normal(0, 1, 3, 3, 2, dtype=jnp.float64), normal(1, 3, 3, 2, 2, dtype=jnp.float64)
    network = Convolution(2)

    def value(x, kernel):
        bias = jnp.zeros(2)
        return jnp.sum(jnp.sin(network.apply({"params": {"kernel": kernel, "bias": bias}}, x)))

    check_grads(jax.jit(value), (x, kernel), order=2, modes=("rev",), rtol=1e-5)
