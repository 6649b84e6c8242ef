"""The networks of the experiments in flax: MLP, LeNet-5, ConvNet, AlexNet, VGG-11, ResNet-18.

With `num_classes=None` each gives its features. `classification` trains many networks at once,
`optimizers` are those of the papers, `convolution` is what makes a CPU fast.
"""

from lib.networks._networks import (
    MLP,
    VGG11,
    AlexNet,
    Conv,
    ConvNet,
    LeNet5,
    ResNet18,
    check_size,
    network_by_name,
    torch_like,
)
