"""Networks: plain `nn.Module`s by name, and the files that their weights come from."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.published import FIRST_NORM_SCALE

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Network:
    """A row of the table: the module of this room that makes the network under its name, and what --list says of it."""

    module: str
    about: str


# Needs no torch: a network's module is imported when the network is made.
NETWORKS = {
    "mobilenet_v1": Network("mobilenet_v1", "MobileNet-V1 (Howard et al. 2017)"),
    "mobilenet_v2": Network("mobilenet_v2", "MobileNet-V2 (Sandler et al. 2018)"),
    "mobilenet_v3_large": Network("mobilenet_v3", "MobileNet-V3, large (Howard et al. 2019)"),
    "mobilenet_v3_small": Network("mobilenet_v3", "MobileNet-V3, small"),
    "resnet18": Network("resnet", "ResNet-18 for ImageNet (He et al. 2015)"),
    "resnet34": Network("resnet", "ResNet-34 for ImageNet"),
    "resnet50": Network("resnet", "ResNet-50 for ImageNet"),
    "resnet18_cifar": Network("resnet", "ResNet-18 with a stem for small pictures"),
    "resnet34_cifar": Network("resnet", "ResNet-34 with a stem for small pictures"),
    "resnet50_cifar": Network("resnet", "ResNet-50 with a stem for small pictures"),
    "resnet20": Network("resnet_cifar", "ResNet-20 for CIFAR (He et al. 2015)"),
    "resnet32": Network("resnet_cifar", "ResNet-32 for CIFAR"),
    "resnet44": Network("resnet_cifar", "ResNet-44 for CIFAR"),
    "resnet56": Network("resnet_cifar", "ResNet-56 for CIFAR"),
    "resnet110": Network("resnet_cifar", "ResNet-110 for CIFAR"),
    "resnet56_b": Network("resnet_cifar", "ResNet-56 for CIFAR with projections, as ResRep prunes it"),
    "resnet110_b": Network("resnet_cifar", "ResNet-110 for CIFAR with projections, as ResRep prunes it"),
    "resnet56_projection": Network("resnet_cifar", "ResNet-56 for CIFAR as stripe-wise pruning starts from it"),
    "vgg16_bn": Network("vgg", "VGG-16 for CIFAR with batch normalisation, as stripe-wise pruning has it"),
    "wrn_28_1": Network("wide_resnet", "Wide ResNet-28-1 for CIFAR (Zagoruyko and Komodakis 2016)"),
    "wrn_28_4": Network("wide_resnet", "Wide ResNet-28-4 for CIFAR"),
    "wrn_28_10": Network("wide_resnet", "Wide ResNet-28-10 for CIFAR"),
    "wrn_40_2": Network("wide_resnet", "Wide ResNet-40-2 for CIFAR"),
}
NAMES = tuple(sorted(NETWORKS))
ALIASES = {f"resnet{depth}s": f"resnet{depth}" for depth in (20, 32, 44, 56)}  # BiP's names of networks -> ours

# What is imported only when it is asked for, since it needs torch: name -> module.
LATE = dict.fromkeys(("describe", "load_checkpoint", "read_checkpoint", "save_checkpoint"), "models.formats")
LATE |= {"widths": "structure"}

__all__ = [
    "ALIASES",
    "NAMES",
    "NETWORKS",
    "create_model",
    "describe",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "widths",
]


def known(name: str) -> str:
    """The one of `NAMES` that `name`, which may be one of `ALIASES`, means. Raises ValueError if there is none."""
    arch = ALIASES.get(name, name)
    if arch not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NAMES)}")
    return arch


def create_model(name: str, num_classes: int = 1000, seed: int = 0) -> "nn.Module":
    """The dense network `name`, a plain `nn.Module`; its attribute `arch` is its name in `NAMES`.

    Its weights depend on the seed alone, and no random state outside changes.

    Raises:
        ValueError: no such network, or no class.
    """
    arch = known(name)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: a network needs at least one class")
    import torch

    make = getattr(importlib.import_module(f"models.{NETWORKS[arch].module}"), arch)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset every GPU's generator, too
        network = make(num_classes)
    if arch in FIRST_NORM_SCALE:
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                torch.nn.init.constant_(layer.weight, FIRST_NORM_SCALE[arch])
    network.arch, network.num_classes = arch, num_classes
    return network


def __getattr__(name: str):
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATE[name]), name)
