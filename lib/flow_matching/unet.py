"""Velocity networks for flow matching: v(x, t) on images, as a flax.linen module.

Images are [n, H, W, channels] in [-1, 1], times [n] in [0, 1]; what comes out has the images'
shape. `init` and `apply` are pure, so an ensemble is a vmap.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lib.networks.convolution import Convolution, Method
from lib.numerics import product

Images = Float[Array, "n height width channels"]
Times = Float[Array, " n"]

# Normalization groups, where they divide the channels.
GROUPS = 8
# The sinusoids' slowest period is MAX_PERIOD / TIME_SCALE times the unit of time.
TIME_SCALE = 1000.0
MAX_PERIOD = 10000.0


def space_to_depth(images: Images, factor: int) -> Float[Array, "n h w c"]:
    """Blocks of factor x factor pixels as channels: [n, H, W, c] -> [n, H/f, W/f, f f c].

    Raises ValueError where `factor` does not divide H and W.
    """
    n, height, width, channels = images.shape
    if height % factor or width % factor:
        raise ValueError(f"{height} x {width} images do not split into blocks of {factor}")
    x = images.reshape(n, height // factor, factor, width // factor, factor, channels)
    return jnp.moveaxis(x, 2, 3).reshape(n, height // factor, width // factor, -1)


def depth_to_space(blocks: Images, factor: int) -> Float[Array, "n h w c"]:
    """The inverse of `space_to_depth`."""
    n, height, width, channels = blocks.shape
    if channels % factor**2:
        raise ValueError(f"{channels} channels do not hold blocks of {factor} x {factor}")
    x = blocks.reshape(n, height, width, factor, factor, -1)
    return jnp.moveaxis(x, 3, 2).reshape(n, height * factor, width * factor, -1)


def sinusoids(times: Times, dimension: int) -> Float[Array, "n dimension"]:
    """cos(w_j t) and sin(w_j t) at frequencies w_j that fall geometrically (Vaswani et al., 2017),
    from TIME_SCALE to TIME_SCALE / MAX_PERIOD; `dimension` is even."""
    exponents = jnp.arange(dimension // 2, dtype=times.dtype) / (dimension // 2)
    angles = jnp.outer(TIME_SCALE * times, MAX_PERIOD**-exponents)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


# The network


class UNet(nn.Module):
    """A U-Net with residual blocks that know the time (Ho et al., 2020; Dhariwal and Nichol, 2021).

    Level i works at 1 / (patch 2^i) of the images' sides with width * multipliers[i] channels:
    `blocks` residual blocks on the way down and as many on the way up, which see those of the way
    down beside their input. Levels in `attention` (counted from 0) have self-attention after each
    block. `patch` makes blocks of pixels channels at the input. Images of any size are padded with
    zeros at their ends, and cropped. The last convolution starts at 0, so the velocity does too.

    `convolution` is how kernel gradients are computed: "patches" is faster on CPU, and for "xla",
    XLA's own, on GPU; parameters and values are the same. With `num_classes` the blocks know the
    labels [n] too: a vector for each class is added to that of the time.

    With width 32, multipliers (1, 2), 1 block and patch 2 it has 421,956 parameters, and takes
    21 million multiply-adds a 28x28 image.
    """

    width: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    patch: int = 1
    convolution: Method = "patches"
    num_classes: int | None = None

    @nn.compact
    def __call__(
        self, images: Images, times: Times, labels: Int[Array, " n"] | None = None
    ) -> Images:
        self.check()
        height, width, channels = images.shape[1:]
        multiple = self.patch * 2 ** (len(self.multipliers) - 1)
        ends = ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0))
        x = space_to_depth(jnp.pad(images, ends), self.patch)
        units = 4 * self.width
        time = nn.silu(nn.Dense(units)(sinusoids(times, self.width)))
        time = nn.Dense(units)(time)
        if self.num_classes is not None:
            if labels is None:
                raise ValueError(f"this U-Net has {self.num_classes} classes: it needs labels")
            time = time + nn.Embed(self.num_classes, units)(labels)
        time = nn.silu(time)

        def block(x, level):
            features = self.width * self.multipliers[level]
            x = _Residual(features, self.convolution)(x, time)
            return _Attention()(x) if level in self.attention else x

        levels, kept = range(len(self.multipliers)), []
        x = Convolution(self.width, method=self.convolution)(x)
        for level in levels:
            if level > 0:
                x = nn.Dense(self.width * self.multipliers[level])(space_to_depth(x, 2))
            for _ in range(self.blocks):
                x = block(x, level)
                kept.append(x)
        x = block(x, levels[-1])
        for level in reversed(levels):
            for _ in range(self.blocks):
                x = block(jnp.concatenate([x, kept.pop()], axis=3), level)
            if level > 0:
                x = depth_to_space(nn.Dense(4 * self.width * self.multipliers[level - 1])(x), 2)
        x = nn.silu(_Norm()(x))
        zeros = nn.initializers.zeros_init()
        x = Convolution(self.patch**2 * channels, method=self.convolution, kernel_init=zeros)(x)
        return depth_to_space(x, self.patch)[:, :height, :width]

    def check(self) -> None:
        """Raises ValueError for settings that make no network."""
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be one or more positive, got {self.multipliers}")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width must be even and at least 2, got {self.width}")
        if self.blocks < 1 or self.patch < 1:
            raise ValueError(f"blocks and patch must be >= 1, got {self.blocks} and {self.patch}")
        if not set(self.attention) <= set(range(len(self.multipliers))):
            raise ValueError(
                f"attention {self.attention} names levels other than 0 to "
                f"{len(self.multipliers) - 1}"
            )


class _Norm(nn.Module):
    """Group normalization (Wu and He, 2018), with further scales and shifts [n, c] where given.

    All of it is one multiplication and addition a pixel, from moments of every channel.
    """

    @nn.compact
    def __call__(self, x, scale=None, shift=None):
        n, height, width, channels = x.shape
        groups = math.gcd(GROUPS, channels)
        # Sums as a product with ones: 15% of a training step less than XLA's reduction on CPU.
        x = lax.optimization_barrier(x)
        both = jnp.concatenate([x, x * x], axis=3).reshape(n, height * width, -1)
        ones = jnp.full((n, 1, height * width), 1 / (height * width), x.dtype)
        moments = product(ones, both)
        means, squares = jnp.moveaxis(moments.reshape(n, 2, groups, -1).mean(axis=3), 1, 0)
        inverse = lax.rsqrt(jnp.maximum(squares - means**2, 0) + 1e-5)
        means, inverse = (jnp.repeat(a, channels // groups, axis=1) for a in (means, inverse))
        scales = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        shifts = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        gain = inverse * scales[None]
        offset = shifts[None] - means * gain
        if scale is not None:
            gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
        return x * gain[:, None, None, :] + offset[:, None, None, :]


class _Residual(nn.Module):
    features: int
    method: Method

    @nn.compact
    def __call__(self, x, time):
        scale, shift = jnp.split(nn.Dense(2 * self.features)(time), 2, axis=1)
        h = Convolution(self.features, method=self.method)(nn.silu(_Norm()(x)))
        h = Convolution(self.features, method=self.method)(nn.silu(_Norm()(h, scale, shift)))
        return h + (x if x.shape[3] == self.features else nn.Dense(self.features)(x))


class _Attention(nn.Module):
    """Self-attention between all pixels of an image, in heads of about 32 channels."""

    @nn.compact
    def __call__(self, x):
        n, height, width, channels = x.shape
        heads = math.gcd(channels, max(1, channels // 32))
        qkv = nn.Dense(3 * channels)(_Norm()(x)).reshape(n, height * width, 3, heads, -1)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return x + nn.Dense(channels)(mixed.reshape(x.shape))
