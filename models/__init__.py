"""Networks: `nn.Module`s by name, ours, a library's or the user's, and the files that their weights come from."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import libraries
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
    "vgg11_bn": Network("vgg", "VGG-11 for CIFAR with batch normalisation, as stripe-wise pruning has it"),
    "vgg13_bn": Network("vgg", "VGG-13 for CIFAR, likewise"),
    "vgg16_bn": Network("vgg", "VGG-16 for CIFAR, likewise"),
    "vgg19_bn": Network("vgg", "VGG-19 for CIFAR, likewise"),
    "vgg11_bn_bip": Network("vgg", "VGG-11 for CIFAR with batch normalisation and three linear layers, as BiP has it"),
    "vgg13_bn_bip": Network("vgg", "VGG-13 for CIFAR, likewise"),
    "vgg16_bn_bip": Network("vgg", "VGG-16 for CIFAR, likewise"),
    "wrn_28_1": Network("wide_resnet", "Wide ResNet-28-1 for CIFAR (Zagoruyko and Komodakis 2016)"),
    "wrn_28_4": Network("wide_resnet", "Wide ResNet-28-4 for CIFAR"),
    "wrn_28_10": Network("wide_resnet", "Wide ResNet-28-10 for CIFAR"),
    "wrn_40_2": Network("wide_resnet", "Wide ResNet-40-2 for CIFAR"),
}
NAMES = tuple(sorted(NETWORKS))
FOREIGN = {  # what else a name may be, for --list
    "timm/NAME": "a network of timm, as timm calls it",
    "torchvision/NAME": "a network of torchvision that classifies, as torchvision calls it",
    "FILE.py:FUNCTION": "what a function of a file returns that takes num_classes",
    "MODULE:FUNCTION": "likewise, of a module that Python finds: package.module:function",
}
BIP_NAMES = {f"resnet{depth}s": f"resnet{depth}" for depth in (20, 32, 44, 56, 110)}  # BiP's networks -> ours
RESREP_NAMES = {"src56": "resnet56_b", "src110": "resnet110_b", "sres50": "resnet50", "smi1": "mobilenet_v1"}
ALIASES = BIP_NAMES | RESREP_NAMES

# What is imported only when it is asked for, since it needs torch: name -> module.
LATE = dict.fromkeys(("describe", "load_checkpoint", "read_checkpoint", "save_checkpoint"), "models.formats")
LATE |= {"plainify": "structure", "widths": "structure"}

__all__ = [
    "ALIASES",
    "FOREIGN",
    "NAMES",
    "NETWORKS",
    "create_model",
    "describe",
    "known",
    "load_checkpoint",
    "plainify",
    "read_checkpoint",
    "rebuildable",
    "save_checkpoint",
    "widths",
]


def known(name: str) -> str:
    """What `name` means: one of `NAMES`, for which it may be one of `ALIASES`, or itself, of a library or a function.

    Needs no torch, so that a library is not asked yet whether it has the network.

    Raises:
        ValueError: there is no such network.
    """
    arch = ALIASES.get(name, name)
    if libraries.of_function(arch):
        libraries.check_function(arch)
    elif arch not in NETWORKS and not libraries.of_library(arch):
        raise ValueError(
            f"unknown network {name!r}: choose one of {', '.join(NAMES)}, or timm/NAME, torchvision/NAME, "
            "FILE.py:FUNCTION, package.module:FUNCTION"
        )
    return arch


def rebuildable(name: object) -> bool:
    """Whether a file may say that its network is `name`: code of the user's own must be named by the user."""
    return name in NETWORKS or (isinstance(name, str) and libraries.of_library(name))


def create_model(name: str, num_classes: int = 1000, seed: int = 0, **options: object) -> "nn.Module":
    """The dense network `name` as its library makes it; its attribute `arch` is what `known` returns for the name.

    Its weights depend on the seed alone, and no random state outside changes.

    Args:
        options: further arguments of a library's or the user's function.

    Raises:
        ValueError: no such network, no class, or an option that it does not take.
    """
    arch = known(name)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: a network needs at least one class")
    if options and arch in NETWORKS:
        raise ValueError(f"--arch_options {' '.join(options)}: {arch} takes none")
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset every GPU's generator, too
        if arch in NETWORKS:
            network = getattr(importlib.import_module(f"models.{NETWORKS[arch].module}"), arch)(num_classes)
        else:
            network = libraries.build(arch, num_classes, options)
    if arch in FIRST_NORM_SCALE:
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                torch.nn.init.constant_(layer.weight, FIRST_NORM_SCALE[arch])
    network.arch, network.num_classes, network.arch_options = arch, num_classes, options
    return network


def __getattr__(name: str):
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATE[name]), name)
