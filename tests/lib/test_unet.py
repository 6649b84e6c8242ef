"""The door's round trips, and the U-Net's shapes and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.flow_matching.unet import (
    UNet,
    _Attention,
    _Norm,
    depth_to_space,
    space_to_depth,
)

SMALL = {"width": 8, "multipliers": (1, 2)}


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# Parts


def test_blocks_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="5 x 4 images do not split into blocks of 2"):
        space_to_depth(jnp.zeros((1, 5, 4, 1)), 2)
    with pytest.raises(ValueError, match="6 channels do not hold blocks of 2 x 2"):
        depth_to_space(jnp.zeros((1, 2, 2, 6)), 2)


@pytest.mark.parametrize("channels", [pytest.param(12, marks=pytest.mark.slow), 16])
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


# The network


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
    """Groups of the norms hold two channels: alone, a channel's bias before its norm is lost."""
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
