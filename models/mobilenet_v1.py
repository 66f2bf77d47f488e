"""MobileNet (Howard et al. 2017, table 1). Sizes in comments are for 224 x 224 pictures."""

import torch
from torch import nn

from models.layers import conv, linear_as_conv


class MobileNetV1(nn.Module):
    ROWS = (  # width, stride of the depthwise convolution
        (64, 1),  # 64, 112, 112
        (128, 2),  # 128, 56, 56
        (128, 1),
        (256, 2),  # 256, 28, 28
        (256, 1),
        (512, 2),  # 512, 14, 14
        (512, 1),
        (512, 1),
        (512, 1),
        (512, 1),
        (512, 1),
        (1024, 2),  # 1024, 7, 7
        (1024, 1),
    )

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        widths = [32, *(width for width, _ in self.ROWS)]
        self.features = nn.Sequential(
            *(separable(inputs, outputs, stride) for inputs, (outputs, stride) in zip(widths, self.ROWS, strict=False))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(linear_as_conv(1024, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv1(images)  # B, 32, 112, 112
        x = self.features(x)  # B, 1024, 7, 7
        x = self.pool(x)  # B, 1024, 1, 1
        return self.classifier(x).flatten(1)  # B, classes


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv(inputs, inputs, 3, stride, groups=inputs),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        conv(inputs, outputs, bias=True),  # the published files have this bias, though a batch norm follows
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


mobilenet_v1 = MobileNetV1
