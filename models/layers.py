"""The two layers that every network here is made of, each with its own initialisation."""

from torch import nn


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that pads so that only its stride makes pictures smaller; weights are He-normal by fan-out."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def linear_as_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A linear layer in the form of a 1x1 convolution, so that it is pruned and compiled as convolutions are."""
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer
