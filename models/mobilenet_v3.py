"""MobileNetV3 (Howard et al. 2019, tables 1 and 2). Sizes in comments are for 224 x 224 pictures."""

from functools import partial

import torch
from torch import nn

from models.layers import conv, linear_as_conv

SMALL = (  # kernel, expansion, width, squeeze-excite, h-swish, stride
    (3, 1, 16, True, False, 2),  # 16, 56, 56
    (3, 4.5, 24, False, False, 2),  # 24, 28, 28
    (3, 3.67, 24, False, False, 1),
    (5, 4, 40, True, True, 2),  # 40, 14, 14
    (5, 6, 40, True, True, 1),
    (5, 6, 40, True, True, 1),
    (5, 3, 48, True, True, 1),  # 48, 14, 14
    (5, 3, 48, True, True, 1),
    (5, 6, 96, True, True, 2),  # 96, 7, 7
    (5, 6, 96, True, True, 1),
    (5, 6, 96, True, True, 1),
)
LARGE = (
    (3, 1, 16, False, False, 1),  # 16, 112, 112
    (3, 4, 24, False, False, 2),  # 24, 56, 56
    (3, 3, 24, False, False, 1),
    (5, 3, 40, True, False, 2),  # 40, 28, 28
    (5, 3, 40, True, False, 1),
    (5, 3, 40, True, False, 1),
    (3, 6, 80, False, True, 2),  # 80, 14, 14
    (3, 2.5, 80, False, True, 1),
    (3, 2.3, 80, False, True, 1),
    (3, 2.3, 80, False, True, 1),
    (3, 6, 112, True, True, 1),  # 112, 14, 14
    (3, 6, 112, True, True, 1),
    (5, 6, 160, True, True, 2),  # 160, 7, 7
    (5, 6, 160, True, True, 1),
    (5, 6, 160, True, True, 1),
)


class MobileNetV3(nn.Module):
    def __init__(self, num_classes: int, rows: tuple, tail: int, head: int):
        super().__init__()
        features = [nn.Sequential(conv(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Hardswish())]
        inputs = 16
        for kernel, expansion, outputs, squeeze, hswish, stride in rows:
            hidden = multiple_of_8(inputs * expansion)
            features.append(InvertedResidual(inputs, hidden, outputs, kernel, stride, squeeze, hswish))
            inputs = outputs
        self.features = nn.Sequential(*features)
        self.conv = nn.Sequential(conv(inputs, tail, bias=True), nn.BatchNorm2d(tail), nn.Hardswish())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            linear_as_conv(tail, head), nn.Hardswish(), nn.Dropout(0.2), linear_as_conv(head, num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features(images)  # B, 96 (small) or 160 (large), 7, 7
        x = self.conv(x)  # B, tail, 7, 7
        x = self.pool(x)  # B, tail, 1, 1
        return self.classifier(x).flatten(1)  # B, classes


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, squeeze: bool, hswish: bool):
        super().__init__()
        activation = nn.Hardswish if hswish else nn.ReLU
        scale = SqueezeExcite(hidden) if squeeze else nn.Identity()
        depthwise = [conv(hidden, hidden, kernel, stride, groups=hidden), nn.BatchNorm2d(hidden)]
        # The published files squeeze before the activation, but after it where nothing is expanded.
        if hidden == inputs:
            body = [*depthwise, activation(), scale]  # hidden, H / stride, W / stride
        else:
            expand = [conv(inputs, hidden, bias=True), nn.BatchNorm2d(hidden), activation()]  # hidden, H, W
            body = [*expand, *depthwise, scale, activation()]  # hidden, H / stride, W / stride
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(*body, conv(hidden, outputs, bias=True), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        squeezed = multiple_of_8(width // 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            linear_as_conv(width, squeezed), nn.ReLU(), linear_as_conv(squeezed, width), nn.Hardsigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(self.pool(x))  # B, width, H, W times B, width, 1, 1


def multiple_of_8(width: float) -> int:
    """The nearest multiple of 8 (halves go up), at least 8 and never less than 90 % of `width`."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * width else nearest + 8


mobilenet_v3_large = partial(MobileNetV3, rows=LARGE, tail=960, head=1280)
mobilenet_v3_small = partial(MobileNetV3, rows=SMALL, tail=576, head=1024)
