"""ResNet for CIFAR (He et al. 2015, section 4.2). Sizes in comments are for 32 x 32 pictures."""

import torch
from torch import nn
from torch.nn import functional

from models.layers import conv


class CifarResNet(nn.Module):
    """6n + 2 layers deep, for `repeats` = n."""

    def __init__(self, num_classes: int, repeats: int):
        super().__init__()
        self.conv1 = conv(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(16, 16, repeats, stride=1)
        self.layer2 = stage(16, 32, repeats, stride=2)
        self.layer3 = stage(32, 64, repeats, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(images)))  # B, 16, 32, 32
        x = self.layer1(x)  # B, 16, 32, 32
        x = self.layer2(x)  # B, 32, 16, 16
        x = self.layer3(x)  # B, 64, 8, 8
        x = self.avgpool(x).flatten(1)  # B, 64
        return self.linear(x)  # B, classes


def stage(inputs: int, width: int, repeats: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, width, stride), *(Block(width, width, 1) for _ in range(repeats - 1)))


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if stride == 1 else ZeroPadding((width - inputs) // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)
        x = self.relu(self.bn1(self.conv1(x)))  # B, width, H / stride, W / stride
        x = self.bn2(self.conv2(x))  # B, width, H / stride, W / stride
        return self.relu(x + shortcut)


class ZeroPadding(nn.Module):
    """The paper's shortcut A, without weights: every second pixel, and as many channels of zeros before as after."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))  # B, 2C, H / 2, W / 2
