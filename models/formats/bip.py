"""Files of BiP (Zhang et al. 2022), which also trains Hydra and IMP: other names, and scores beside the weights."""

from dataclasses import replace

from torch import nn

from models import BIP_NAMES
from models.formats.content import Content, Names, has_names, renamed
from models.formats.own import SCORES

UNUSED = "sub_block1."  # begins the names of tensors in wide ResNets that nothing is computed with
NAMES: dict[str, Names] = {  # a classifier that is called `linear` here is called `fc` there, and the other way round
    **dict.fromkeys(BIP_NAMES.values(), ("fc.weight", (("fc", "linear"),))),
    **dict.fromkeys(
        ("resnet18_cifar", "resnet34_cifar", "resnet50_cifar"),
        ("linear.weight", (("linear", "fc"), (r"(layer\d\.\d+)\.shortcut\.([01])", r"\1.downsample.\2"))),
    ),
}


def recognise(content: Content, network: nn.Module) -> bool:
    if any(name.startswith(UNUSED) for name in content.tensors):
        return True
    return has_names(content, network, NAMES) and not {"fc.weight", "linear.weight"} <= content.tensors.keys()


def read(content: Content, network: nn.Module) -> Content:
    """Its scores stay, those of unused layers, too, since its code ranks these together with all others."""
    unused = {name for name in content.tensors if name.startswith(UNUSED) and not name.endswith(SCORES)}
    tensors = {name: tensor for name, tensor in content.tensors.items() if name not in unused}
    ours = renamed(replace(content, tensors=tensors), network, NAMES)
    # Its names of other networks mean ours of another: it calls resnet18_cifar resnet18.
    return replace(ours, arch=ours.arch or BIP_NAMES.get(content.arch))
