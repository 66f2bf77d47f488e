"""Layers that take other tensors, and whose numbers of channels follow."""

from collections.abc import Mapping

from torch import Tensor, nn

from structure.constants import Constant
from structure.graph import norms_after_convolutions


def replace(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` of any width in the place of a layer's own; its numbers of channels and groups follow them.

    Args:
        module: a convolution, linear layer or batch norm. A convolution of several groups keeps their number, but
            a depthwise one keeps one group a channel.
        tensors: name in the module -> new parameter or buffer.
    """
    for name, tensor in tensors.items():
        if name in module._parameters:
            old = module._parameters[name]
            tensor = nn.Parameter(tensor.contiguous(), requires_grad=old is None or old.requires_grad)
        setattr(module, name, tensor)
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        outputs, inputs = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            module.groups = outputs
        module.out_channels, module.in_channels = outputs, inputs * module.groups


def narrow(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give the layers of `network`, in place, the channels of a narrower network's `state_dict`; values stay unset.

    A batch norm that `state` lacks while its convolution has a bias there was merged into that: `nn.Identity` takes its
    place. A layer that has a `value` there was removed with its branch: `Constant` takes its place. A tensor that is
    wider than the network's changes nothing here, so that loading it fails.
    """
    convolutions = norms_after_convolutions(network)
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        if f"{name}.value" in state:
            network.set_submodule(name, Constant(state[f"{name}.value"].to(module.weight.device)))
        elif f"{name}.weight" in state:
            if module.bias is None and f"{name}.bias" in state:
                module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
            replace(module, _unset_tensors(name, module, state))
        elif f"{convolutions.get(name)}.bias" in state:
            network.set_submodule(name, nn.Identity())
    return network


def _unset_tensors(layer: str, module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New tensors for those of a layer that have fewer rows or columns in `state`, which names them `layer.tensor`."""
    unset = {}
    for name, ours in [*module.named_parameters(), *module.named_buffers()]:
        theirs = state.get(f"{layer}.{name}")
        if theirs is None or not ours.dim():
            continue
        shape = theirs.shape[: min(2, ours.dim())]  # rows and columns; the size of a kernel is not up to the file
        if shape and all(few <= many for few, many in zip(shape, ours.shape, strict=False)):
            unset[name] = ours.new_empty((*shape, *ours.shape[2:]))
    return unset


def widths(network: nn.Module) -> dict[str, int]:
    """Convolution or linear layer -> its number of output channels."""
    layers = network.named_modules()
    return {name: len(layer.weight) for name, layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)}
