"""Wide ResNet (Zagoruyko & Komodakis 2016, table 1, without dropout). Sizes in comments are for 32 x 32 pictures."""

from functools import partial

import torch
from torch import nn

from models.layers import conv


class WideResNet(nn.Module):
    """6n + 4 layers deep, 16 `width` channels wide in the first stage; layers have their usual names in PyTorch."""

    def __init__(self, num_classes: int, depth: int, width: int):
        super().__init__()
        repeats = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = Stage(16, 16 * width, repeats, stride=1)
        self.block2 = Stage(16 * width, 32 * width, repeats, stride=2)
        self.block3 = Stage(32 * width, 64 * width, repeats, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv1(images)  # B, 16, 32, 32
        x = self.block1(x)  # B, 16 width, 32, 32
        x = self.block2(x)  # B, 32 width, 16, 16
        x = self.block3(x)  # B, 64 width, 8, 8
        x = self.relu(self.bn1(x))  # B, 64 width, 8, 8
        x = self.avgpool(x).flatten(1)  # B, 64 width
        return self.fc(x)  # B, classes


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, repeats: int, stride: int):
        super().__init__()
        first = Block(inputs, outputs, stride)
        self.layer = nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(repeats - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Block(nn.Module):
    """Batch norm and ReLU come before each convolution, also before that of the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.relu = nn.ReLU()  # not in place: the shortcut needs x
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(x))  # B, inputs, H, W
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = self.relu(self.bn2(self.conv1(y)))  # B, outputs, H / stride, W / stride
        return self.conv2(y) + shortcut  # B, outputs, H / stride, W / stride


wrn_28_1 = partial(WideResNet, depth=28, width=1)
wrn_28_4 = partial(WideResNet, depth=28, width=4)
wrn_28_10 = partial(WideResNet, depth=28, width=10)
wrn_40_2 = partial(WideResNet, depth=40, width=2)
