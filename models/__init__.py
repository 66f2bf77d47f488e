"""Networks: plain `nn.Module`s by name, and the files that their weights come from."""

from functools import partial

import torch
from torch import nn

from models.formats import describe, load_checkpoint, read_checkpoint, save_checkpoint
from models.formats.bip import ALIASES
from models.mobilenet_v1 import MobileNetV1
from models.mobilenet_v2 import MobileNetV2
from models.mobilenet_v3 import LARGE, SMALL, MobileNetV3
from models.resnet import BasicBlock, Bottleneck, ResNet, projection
from models.resnet_cifar import CifarResNet, ProjectionResNet
from models.vgg import VGG16
from models.wide_resnet import WideResNet
from structure import widths

NETWORKS = {
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": partial(MobileNetV3, rows=LARGE, tail=960, head=1280),
    "mobilenet_v3_small": partial(MobileNetV3, rows=SMALL, tail=576, head=1024),
    "resnet18": partial(ResNet, block=BasicBlock, repeats=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, repeats=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, repeats=(3, 4, 6, 3)),
    "resnet18_cifar": partial(ResNet, block=BasicBlock, repeats=(2, 2, 2, 2), cifar=True),
    "resnet34_cifar": partial(ResNet, block=BasicBlock, repeats=(3, 4, 6, 3), cifar=True),
    "resnet50_cifar": partial(ResNet, block=Bottleneck, repeats=(3, 4, 6, 3), cifar=True),
    "resnet20": partial(CifarResNet, repeats=3),
    "resnet32": partial(CifarResNet, repeats=5),
    "resnet44": partial(CifarResNet, repeats=7),
    "resnet56": partial(CifarResNet, repeats=9),
    "resnet110": partial(CifarResNet, repeats=18),
    "resnet56_b": partial(CifarResNet, repeats=9, shortcut=projection),
    "resnet110_b": partial(CifarResNet, repeats=18, shortcut=projection),
    "resnet56_projection": partial(ProjectionResNet, repeats=9),
    "vgg16_bn": VGG16,
    "wrn_28_1": partial(WideResNet, depth=28, width=1),
    "wrn_28_4": partial(WideResNet, depth=28, width=4),
    "wrn_28_10": partial(WideResNet, depth=28, width=10),
    "wrn_40_2": partial(WideResNet, depth=40, width=2),
}
NAMES = tuple(sorted(NETWORKS))

__all__ = [
    "ALIASES",
    "NAMES",
    "create_model",
    "describe",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "widths",
]


def create_model(name: str, num_classes: int = 1000, seed: int = 0) -> nn.Module:
    """The dense network `name`, one of `NAMES` or of `ALIASES`; its attribute `arch` is the one in `NAMES`.

    Its weights depend on the seed alone, and no random state outside changes.

    Raises:
        ValueError: no such network, or no class.
    """
    arch = ALIASES.get(name, name)
    if arch not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NAMES)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: a network needs at least one class")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset every GPU's generator, too
        network = NETWORKS[arch](num_classes)
    network.arch, network.num_classes = arch, num_classes
    return network
