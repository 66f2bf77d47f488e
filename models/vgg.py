"""VGG-16 with batch normalisation, as CIFAR uses it. Sizes in comments are for 32 x 32 pictures."""

import torch
from torch import nn


class VGG16(nn.Module):
    ROWS = (  # widths of the 3x3 convolutions before each halving
        (64, 64),  # 64, 16, 16
        (128, 128),  # 128, 8, 8
        (256, 256, 256),  # 256, 4, 4
        (512, 512, 512),  # 512, 2, 2
        (512, 512, 512),  # 512, 1, 1
    )

    def __init__(self, num_classes: int):
        super().__init__()
        features, inputs = [], 3
        for row in self.ROWS:
            for width in row:
                features += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
                features += [nn.ReLU(inplace=True)]
                inputs = width
            features += [nn.MaxPool2d(2, ceil_mode=True)]  # pictures smaller than 32 x 32 keep a pixel
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)  # B, 512, 1, 1
        x = self.pool(x).flatten(1)  # B, 512
        return self.classifier(x)  # B, classes


vgg16_bn = VGG16
