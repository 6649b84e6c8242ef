"""The MMD between samples against loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from strategies import normal

from lib.kernels import laplace, linear, riesz
from lib.mmd import mmd_squared, mmd_squared_unbiased


def test_gradients_agree_with_finite_differences(x64):
    x, y, w = normal(0, 5, 2), normal(1, 4, 2), np.arange(1.0, 6.0)

    def value(x, w):
        y_array = jnp.asarray(y)
        return mmd_squared_unbiased(laplace(1.0), x, y_array, x_weights=w, block_size=3)

    check_grads(jax.jit(value), (x, w), order=1, modes=("rev",), rtol=1e-6)


@pytest.mark.parametrize("kernel", [laplace(1.0), riesz()], ids=["laplace", "riesz"])
def test_gradient_at_identical_samples_is_zero(kernel):
    x = jnp.asarray(normal(0, 6, 12), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x, y: mmd_squared(kernel, x, y)))(x, x)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("mmd", [mmd_squared, mmd_squared_unbiased])
@pytest.mark.usefixtures("unannotated")
def test_bad_samples_raise(mmd):
    x, y = jnp.ones((3, 2)), jnp.ones((4, 2))
    for a, b, weights, message in (
        (x, y.at[1, 0].set(jnp.nan), None, "y is not finite in row 1"),
        (x[:0], y, None, r"x must be .* got shape \(0, 2\)"),
        (x, y, jnp.array([1.0, 1.0, -1.0, 1.0]), "y_weights must be >= 0"),
        (x, y[:, :1], None, r"shapes \(3, 2\) and \(4, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mmd(linear(), a, b, y_weights=weights)
    with pytest.raises(ValueError, match=r"two points .* got 1 and 4"):
        mmd_squared_unbiased(linear(), x[:1], y)
