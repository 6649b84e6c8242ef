"""Networks, as flax.linen modules: `init` and `apply` are pure, so an ensemble is a vmap.

Images are [N, H, W, channels] with values as the caller normalized them; outputs are logits
[N, num_classes], or, where `num_classes` is None, the features [N, f] that go into the last linear
layer. Parameters of the one serve the other, which has no use for the last layer's.
"""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling
from jaxtyping import Array, Float

from lib.networks.convolution import Convolution, Images, Method

Outputs = Float[Array, "n classes_or_features"]

# torch's default for convolutions and linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), whose
# variance is 1 / (3 fan_in). It scales biases alike; here they start at 0.
torch_like = variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(Convolution):
    """A convolution that starts as torch's do, except its biases."""

    kernel_init: nn.initializers.Initializer = torch_like


class MLP(nn.Module):
    """Dense layers of `hidden` units with ReLU between them, on images as rows of pixels."""

    num_classes: int | None = 10
    hidden: tuple[int, ...] = (128,)

    @nn.compact
    def __call__(self, images: Images) -> Outputs:
        x = images.reshape(len(images), -1)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
        return x if self.num_classes is None else nn.Dense(self.num_classes)(x)


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and average pooling.

    `first_kernel` = 1, the default, has 61,562 parameters at 28x28 gray, the number of the network
    that the published transfer experiments train (Bonet et al., 2025); 5 is the classical one with
    61,706. The input keeps its size in the first convolution. Images smaller than `SMALLEST` a
    side raise ValueError: nothing would be left of them.
    """

    SMALLEST: ClassVar[int] = 12

    num_classes: int | None = 10
    first_kernel: int = 1

    @nn.compact
    def __call__(self, images: Images) -> Outputs:
        check_size(self, images.shape[1:])
        # The batch comes last until the dense layers: see `_PatchConv`.
        x = jnp.transpose(images, (3, 1, 2, 0))
        x = _pool(nn.relu(_PatchConv(6, self.first_kernel, self.first_kernel // 2)(x)))
        x = _pool(nn.relu(_PatchConv(16, 5, 0)(x)))
        x = x.reshape(-1, x.shape[-1]).T
        x = nn.relu(nn.Dense(120)(x))
        x = nn.relu(nn.Dense(84)(x))
        return x if self.num_classes is None else nn.Dense(self.num_classes)(x)


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
            "kernel", nn.initializers.lecun_normal(), (size, size, channels, features), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros_init(), (features,), jnp.float32)
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


class _ConvolutionalNetwork(nn.Module):
    """What the networks of data set condensation share: `features`, flattened, and a linear layer.

    `convolution` is how gradients are computed; parameters and values are the same: see `Method`.
    """

    num_classes: int | None = 10
    convolution: Method = "xla"

    @nn.compact
    def __call__(self, images: Images) -> Outputs:
        check_size(self, images.shape[1:])
        x = self.features(images).reshape(len(images), -1)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, kernel_init=torch_like)(x)

    def features(self, images: Images) -> Array:
        raise NotImplementedError

    def conv(self, x, width: int, size: int = 3, stride: int = 1, use_bias: bool = True):
        """A convolution and an instance norm: a group norm with as many groups as channels, whose
        moments are an image's own (no running statistics, no difference in training)."""
        x = Conv(width, size, self.convolution, stride=stride, use_bias=use_bias)(x)
        return nn.GroupNorm(num_groups=None, group_size=1, epsilon=1e-5)(x)


class ConvNet(_ConvolutionalNetwork):
    """`depth` blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, then a linear layer:
    the network of data set condensation (Zhao and Bilen, 2021).

    28x28 images are padded to 32x32. With the defaults it has 317,706 parameters at 28x28 gray and
    320,010 at 32x32 color. The features are the last pool's output, flattened: 2,048 by default.
    Images smaller than 2^depth a side raise ValueError.
    """

    depth: int = 3
    width: int = 128

    def features(self, images: Images) -> Array:
        x = _padded(images)
        for _ in range(self.depth):
            x = nn.avg_pool(nn.relu(self.conv(x, self.width)), (2, 2), strides=(2, 2))
        return x


class AlexNet(_ConvolutionalNetwork):
    """Five convolutions, three 2x2 max pools and a linear layer: AlexNet (Krizhevsky et al., 2012)
    for small images, as Zhao and Bilen (2021) test condensed sets with.

    They have no norm in it. 28x28 images are padded to 32x32; at this size it has 1,872,202
    parameters for color images, 1,865,802 for gray ones.
    """

    SMALLEST: ClassVar[int] = 8

    widths: tuple[int, int, int, int, int] = (128, 192, 256, 192, 192)

    def features(self, images: Images) -> Array:
        x = _padded(images)
        for i, (width, size) in enumerate(zip(self.widths, (5, 5, 3, 3, 3))):
            x = nn.relu(Conv(width, size, self.convolution)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2)) if i in (0, 1, 4) else x
        return x


class VGG11(_ConvolutionalNetwork):
    """Eight 3x3 convolutions with norms, five 2x2 max pools, one linear layer: VGG-11 (Simonyan and
    Zisserman, 2015) for small images, as Zhao and Bilen (2021) test condensed sets with.

    28x28 images are padded to 32x32. `widths` are those between two pools. 9,231,114 parameters for
    color images, 9,229,962 for gray ones.
    """

    SMALLEST: ClassVar[int] = 32

    widths: tuple[tuple[int, ...], ...] = ((64,), (128,), (256, 256), (512, 512), (512, 512))

    def features(self, images: Images) -> Array:
        x = _padded(images)
        for stage in self.widths:
            for width in stage:
                x = nn.relu(self.conv(x, width))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return x


class ResNet18(_ConvolutionalNetwork):
    """ResNet-18 (He et al., 2016) for small images, as Zhao and Bilen (2021) test condensed sets
    with: a 3x3 convolution of stride 1 first and no pool after it, then two basic blocks at
    each width, all but the first width at half the side of the one before, the mean over pixels,
    and a linear layer.

    11,173,962 parameters for color images, 11,172,810 for gray ones.
    """

    SMALLEST: ClassVar[int] = 9  # below, the last norms are over one pixel, and leave nothing of it

    widths: tuple[int, ...] = (64, 128, 256, 512)

    def features(self, images: Images) -> Array:
        x = nn.relu(self.conv(images, self.widths[0], use_bias=False))
        for stage, width in enumerate(self.widths):
            x = self.block(x, width, stride=1 if stage == 0 else 2)
            x = self.block(x, width, stride=1)
        return x.mean(axis=(1, 2))

    def block(self, x, width: int, stride: int):
        """Two 3x3 convolutions, and the input added: through a 1x1 one where shapes differ."""
        y = nn.relu(self.conv(x, width, stride=stride, use_bias=False))
        y = self.conv(y, width, use_bias=False)
        if stride > 1 or x.shape[3] != width:
            x = self.conv(x, width, 1, stride, use_bias=False)
        return nn.relu(y + x)


def _padded(images):
    """28x28 images at the size the networks are made for, 32x32."""
    if images.shape[1:3] != (28, 28):
        return images
    return jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))


def check_size(network: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError for images (height, width, channels) that are too small for the network."""
    name, smallest = type(network).__name__, getattr(network, "SMALLEST", 1)
    if isinstance(network, ConvNet):
        name, smallest = f"ConvNet of depth {network.depth}", 2**network.depth
    height, width = image_shape[:2]
    side = 32 if (height, width) == (28, 28) else min(height, width)  # those are padded
    if side < smallest:
        raise ValueError(
            f"{name} needs images of at least {smallest} x {smallest}, "
            f"these have {height} x {width}"
        )


# By name


def network_by_name(
    name: str,
    num_classes: int | None,
    image_shape: tuple[int, int, int],
    *,
    width: int = 128,
    depth: int = 3,
    convolution: Method = "xla",
) -> nn.Module:
    """The network that tests of condensed sets know by this name: convnet (of `width` and `depth`,
    which are its own), mlp (two hidden layers of 128), lenet, alexnet, vgg11, resnet18.
    `convolution` is of convnet and the last three.

    Raises ValueError on other names, and for images (height, width, channels) that are too small.
    """
    networks = {
        "convnet": ConvNet(num_classes, depth=depth, width=width, convolution=convolution),
        "mlp": MLP(num_classes, hidden=(128, 128)),
        "lenet": LeNet5(num_classes, first_kernel=5),
        "alexnet": AlexNet(num_classes, convolution=convolution),
        "vgg11": VGG11(num_classes, convolution=convolution),
        "resnet18": ResNet18(num_classes, convolution=convolution),
    }
    if name not in networks:
        raise ValueError(f"no network {name!r}; there are {', '.join(networks)}")
    check_size(networks[name], image_shape)
    return networks[name]
