"""Files of BiP (Zhang et al. 2022), which also trains Hydra and IMP: other names, and scores beside the weights."""

from dataclasses import replace

from torch import nn

from models.formats.content import Content, Names, has_names, renamed

# What BiP calls networks of ours, whose classifier is `fc` there.
ALIASES = {f"resnet{depth}s": f"resnet{depth}" for depth in (20, 32, 44, 56)}
UNUSED = "sub_block1."  # in wide ResNets; nothing is computed with it
NAMES: dict[str, Names] = {
    **dict.fromkeys(ALIASES.values(), ("fc.weight", (("fc", "linear"),))),
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
    tensors = {name: tensor for name, tensor in content.tensors.items() if not name.startswith(UNUSED)}
    content = replace(content, tensors=tensors)
    arch = ALIASES.get(content.arch)  # its other names are not ours: it calls resnet18_cifar resnet18
    if has_names(content, network, NAMES):
        content = renamed(content, NAMES[network.arch][1])
    return replace(content, arch=arch)
