"""Networks, as flax.linen modules: `init` and `apply` are pure, so an ensemble is a vmap.

Images are [N, H, W, channels] with values as the caller normalised them; outputs are logits
[N, classes].
"""

from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling
from jaxtyping import Array, Float

Images = Float[Array, "n height width channels"]
Logits = Float[Array, "n classes"]

# torch's default for convolutions and linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), whose
# variance is 1 / (3 fan_in). It scales biases alike; here they start at 0.
torch_like = variance_scaling(1 / 3, "fan_in", "uniform")


class MLP(nn.Module):
    """Dense layers of `hidden` units with ReLU between them, on images as rows of pixels."""

    num_classes: int = 10
    hidden: tuple[int, ...] = (128,)

    @nn.compact
    def __call__(self, images: Images) -> Logits:
        x = images.reshape(len(images), -1)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.num_classes)(x)


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and average pooling.

    `first_kernel` = 1, the default, has 61,562 parameters at 28x28 grey, the number of the network
    that the published transfer experiments train (Bonet et al., 2025); 5 is the classical one with
    61,706. The input keeps its size in the first convolution. Images smaller than `SMALLEST` a
    side raise ValueError: nothing would be left of them.
    """

    SMALLEST: ClassVar[int] = 12

    num_classes: int = 10
    first_kernel: int = 1

    @nn.compact
    def __call__(self, images: Images) -> Logits:
        self.check(images.shape[1:])
        # The batch comes last until the dense layers: see `_PatchConv`.
        x = jnp.transpose(images, (3, 1, 2, 0))
        x = _pool(nn.relu(_PatchConv(6, self.first_kernel, self.first_kernel // 2)(x)))
        x = _pool(nn.relu(_PatchConv(16, 5, 0)(x)))
        x = x.reshape(-1, x.shape[-1]).T
        x = nn.relu(nn.Dense(120)(x))
        x = nn.relu(nn.Dense(84)(x))
        return nn.Dense(self.num_classes)(x)

    @classmethod
    def check(cls, image_shape: tuple[int, ...]) -> None:
        """Raises ValueError for images (height, width, channels) that are too small."""
        height, width = image_shape[:2]
        if min(height, width) < cls.SMALLEST:
            raise ValueError(
                f"LeNet-5 needs images of at least {cls.SMALLEST} x {cls.SMALLEST}, "
                f"these have {height} x {width}"
            )


class _PatchConv(nn.Module):
    """A convolution [channels, H, W, N] as one matrix product with the patches of the input.

    XLA's CPU convolution takes 7 times longer (LeNet-5, batch 64, with its gradient), and a vmap
    over kernels makes it a grouped one, no faster. For few channels: patches are kernel_size^2
    times the input.
    """

    features: int
    kernel_size: int
    padding: int

    @nn.compact
    def __call__(self, x):
        channels, size, features = x.shape[0], self.kernel_size, self.features
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (size, size, channels, features)
        )
        bias = self.param("bias", nn.initializers.zeros_init(), (features,))
        x = jnp.pad(x, ((0, 0), (self.padding,) * 2, (self.padding,) * 2, (0, 0)))
        height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
        patches = jnp.stack(
            [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
        )
        product = kernel.reshape(-1, features).T @ patches.reshape(size * size * channels, -1)
        return product.reshape(features, height, width, -1) + bias[:, None, None, None]


def _pool(x: Float[Array, "channels height width n"]):
    """Means over 2x2 pixels; an odd last row or column is left out."""
    channels, height, width, n = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(channels, height // 2, 2, width // 2, 2, n).mean(axis=(2, 4))


class ConvNet(nn.Module):
    """`depth` blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, then a linear layer:
    the network of data set condensation (Zhao and Bilen, 2021).

    28x28 images are padded to 32x32. With the defaults it has 317,706 parameters at 28x28 grey and
    320,010 at 32x32 colour. `norm` "instance" is a group norm with as many groups as channels.
    """

    num_classes: int = 10
    depth: int = 3
    width: int = 128
    norm: Literal["instance", "none"] = "instance"

    @nn.compact
    def __call__(self, images: Images) -> Logits:
        x = images
        if x.shape[1] == x.shape[2] == 28:
            x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        for _ in range(self.depth):
            x = nn.Conv(self.width, (3, 3), kernel_init=torch_like)(x)
            if self.norm == "instance":
                x = nn.GroupNorm(num_groups=None, group_size=1, epsilon=1e-5)(x)
            x = nn.avg_pool(nn.relu(x), (2, 2), strides=(2, 2))
        return nn.Dense(self.num_classes, kernel_init=torch_like)(x.reshape(len(x), -1))
