"""ResNet for CIFAR (He et al. 2015, section 4.2). Sizes in comments are for 32 x 32 pictures."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from models.layers import conv
from models.resnet import BasicBlock, projection


class CifarResNet(nn.Module):
    """6n + 2 layers deep, for `repeats` = n.

    Args:
        head: name of the classifier, as in the published files.
        shortcut: makes the shortcut of a block: the paper's A (`zero_padding`, the default) or B (`projection`).
    """

    def __init__(self, num_classes: int, repeats: int, head: str = "linear", shortcut: Callable | None = None):
        super().__init__()
        self.conv1 = conv(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        shortcut = shortcut or zero_padding
        self.layer1 = stage(16, 16, repeats, 1, shortcut)
        self.layer2 = stage(16, 32, repeats, 2, shortcut)
        self.layer3 = stage(32, 64, repeats, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = nn.Linear(64, num_classes)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
        self.head = head
        self.add_module(head, classifier)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(images)))  # B, 16, 32, 32
        x = self.layer1(x)  # B, 16, 32, 32
        x = self.layer2(x)  # B, 32, 16, 16
        x = self.layer3(x)  # B, 64, 8, 8
        x = self.avgpool(x).flatten(1)  # B, 64
        return self.get_submodule(self.head)(x)  # B, classes


def stage(inputs: int, width: int, repeats: int, stride: int, shortcut) -> nn.Sequential:
    first = BasicBlock(inputs, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width, 1, shortcut) for _ in range(repeats - 1)))


def zero_padding(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """The shortcut where a block changes the shape, nothing where it does not."""
    return None if stride == 1 else ZeroPadding((outputs - inputs) // 2)


class ZeroPadding(nn.Module):
    """The paper's shortcut A, without weights: every second pixel, and as many channels of zeros before as after."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))  # B, 2C, H / 2, W / 2


resnet20 = partial(CifarResNet, repeats=3)
resnet32 = partial(CifarResNet, repeats=5)
resnet44 = partial(CifarResNet, repeats=7)
resnet56 = partial(CifarResNet, repeats=9)
resnet110 = partial(CifarResNet, repeats=18)
resnet56_b = partial(resnet56, shortcut=projection)
resnet110_b = partial(resnet110, shortcut=projection)
resnet56_projection = partial(CifarResNet, repeats=9, head="fc", shortcut=projection)
