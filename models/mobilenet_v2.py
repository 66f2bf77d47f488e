"""MobileNetV2 (Sandler et al. 2018, table 2). Sizes in comments are for 224 x 224 pictures."""

import torch
from torch import nn

from models.layers import conv, linear_as_conv


class MobileNetV2(nn.Module):
    ROWS = (  # expansion, width, repeats, stride of the first
        (1, 16, 1, 1),  # 16, 112, 112
        (6, 24, 2, 2),  # 24, 56, 56
        (6, 32, 3, 2),  # 32, 28, 28
        (6, 64, 4, 2),  # 64, 14, 14
        (6, 96, 3, 1),  # 96, 14, 14
        (6, 160, 3, 2),  # 160, 7, 7
        (6, 320, 1, 1),  # 320, 7, 7
    )

    def __init__(self, num_classes: int):
        super().__init__()
        features = [nn.Sequential(conv(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU6(inplace=True))]
        inputs = 32
        for expansion, outputs, repeats, stride in self.ROWS:
            for i in range(repeats):
                features.append(InvertedResidual(inputs, outputs, expansion, stride if i == 0 else 1))
                inputs = outputs
        features.append(nn.Sequential(conv(320, 1280, bias=True), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.0), linear_as_conv(1280, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)  # B, 1280, 7, 7
        x = self.pool(x)  # B, 1280, 1, 1
        return self.classifier(x).flatten(1)  # B, classes


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        hidden = inputs * expansion
        expand = [conv(inputs, hidden, bias=True), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *(expand if expansion > 1 else []),  # hidden, H, W
            conv(hidden, hidden, 3, stride, groups=hidden),  # hidden, H / stride, W / stride
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            conv(hidden, outputs, bias=True),  # outputs, H / stride, W / stride
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


mobilenet_v2 = MobileNetV2
