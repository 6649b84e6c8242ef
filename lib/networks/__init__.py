"""The networks of the experiments; convolution, optimizers and training beside them."""

from lib.networks._networks import (
    MLP,
    VGG11,
    AlexNet,
    Conv,
    ConvNet,
    Images,
    LeNet5,
    Norm,
    Outputs,
    ResNet18,
    check_size,
    network_by_name,
    torch_like,
)
