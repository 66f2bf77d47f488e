"""VGG with batch normalisation, as CIFAR uses it. Sizes in comments are for 32 x 32 pictures."""

from functools import partial

import torch
from torch import nn

# Widths of the 3x3 convolutions before each halving of the picture, by depth.
ROWS = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """The five rows of a VGG, each followed by a halving; then one linear layer, as in stripe-wise pruning."""

    def __init__(self, num_classes: int, depth: int):
        super().__init__()
        halvings = [nn.MaxPool2d(2, ceil_mode=True) for _ in ROWS[depth]]  # smaller pictures keep a pixel
        self.features = features(depth, halvings)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = linear(512, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)  # B, 512, 1, 1
        x = self.pool(x).flatten(1)  # B, 512
        return self.classifier(x)  # B, classes


class BipVGG(nn.Module):
    """BiP's VGG: the last row is not halved but averaged to 2 x 2 pixels, and three linear layers read these."""

    def __init__(self, num_classes: int, depth: int):
        super().__init__()
        self.features = features(depth, [nn.MaxPool2d(2, ceil_mode=True) for _ in ROWS[depth][1:]])
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            linear(512 * 2 * 2, 256),
            nn.ReLU(inplace=True),
            linear(256, 256),
            nn.ReLU(inplace=True),
            linear(256, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)  # B, 512, 2, 2
        x = self.avgpool(x).flatten(1)  # B, 2048
        return self.classifier(x)  # B, classes


def features(depth: int, halvings: list[nn.Module]) -> nn.Sequential:
    """The convolutions, with a halving after each row as long as there are any."""
    layers, inputs = [], 3
    for number, row in enumerate(ROWS[depth]):
        for width in row:
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(inplace=True)]
            inputs = width
        layers += halvings[number : number + 1]
    return nn.Sequential(*layers)


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


vgg11_bn = partial(VGG, depth=11)
vgg13_bn = partial(VGG, depth=13)
vgg16_bn = partial(VGG, depth=16)
vgg19_bn = partial(VGG, depth=19)
vgg11_bn_bip = partial(BipVGG, depth=11)
vgg13_bn_bip = partial(BipVGG, depth=13)
vgg16_bn_bip = partial(BipVGG, depth=16)
