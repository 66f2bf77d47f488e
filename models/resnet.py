"""ResNet for ImageNet (He et al. 2015, table 1; stride on the 3x3). Sizes in comments are for 224 x 224 pictures.

In its CIFAR form the stem is one 3x3 convolution, so that 32 x 32 pictures are 32 x 32 in the first stage.
"""

from functools import partial

import torch
from torch import nn

from models.layers import conv, linear_as_conv


class ResNet(nn.Module):
    def __init__(self, num_classes: int, block: type, repeats: tuple[int, int, int, int], cifar: bool = False):
        super().__init__()
        self.conv1 = conv(3, 64, 3) if cifar else conv(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, stride=2, padding=1)
        expansion = block.expansion
        self.layer1 = stage(block, 64, 64, repeats[0], stride=1)
        self.layer2 = stage(block, 64 * expansion, 128, repeats[1], stride=2)
        self.layer3 = stage(block, 128 * expansion, 256, repeats[2], stride=2)
        self.layer4 = stage(block, 256 * expansion, 512, repeats[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = linear_as_conv(512 * expansion, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # e = 1 with basic blocks, 4 with bottlenecks
        x = self.relu(self.bn1(self.conv1(images)))  # B, 64, 112, 112
        x = self.maxpool(x)  # B, 64, 56, 56
        x = self.layer1(x)  # B, 64e, 56, 56
        x = self.layer2(x)  # B, 128e, 28, 28
        x = self.layer3(x)  # B, 256e, 14, 14
        x = self.layer4(x)  # B, 512e, 7, 7
        x = self.avgpool(x)  # B, 512e, 1, 1
        return self.fc(x).flatten(1)  # B, classes


def stage(block: type, inputs: int, width: int, repeats: int, stride: int) -> nn.Sequential:
    first = block(inputs, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(repeats - 1)))


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The shortcut's 1x1 convolution where a block changes the shape, nothing where it does not."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut=projection):
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))  # B, width, H / stride, W / stride
        x = self.bn2(self.conv2(x))  # B, width, H / stride, W / stride
        return self.relu(x + shortcut)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(inputs, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))  # B, width, H, W
        x = self.relu(self.bn2(self.conv2(x)))  # B, width, H / stride, W / stride
        x = self.bn3(self.conv3(x))  # B, 4 width, H / stride, W / stride
        return self.relu(x + shortcut)


resnet18 = partial(ResNet, block=BasicBlock, repeats=(2, 2, 2, 2))
resnet34 = partial(ResNet, block=BasicBlock, repeats=(3, 4, 6, 3))
resnet50 = partial(ResNet, block=Bottleneck, repeats=(3, 4, 6, 3))
resnet18_cifar = partial(resnet18, cifar=True)
resnet34_cifar = partial(resnet34, cifar=True)
resnet50_cifar = partial(resnet50, cifar=True)
