"""The networks of the experiments; convolution, optimizers and training beside them."""

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
