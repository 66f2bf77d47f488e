"""Networks with fewer channels than their table says, shaped by the tensors of a file."""

import torch
import torch.fx
from torch import Tensor, nn


def norms_after_convolutions(network: nn.Module) -> dict[str, str]:
    """Batch norm -> the convolution whose output it alone reads, by name; nothing if it cannot be traced."""
    try:
        nodes = torch.fx.Tracer().trace(network).nodes
    except Exception:  # torch.fx raises many kinds
        return {}
    modules = dict(network.named_modules())
    calls = {node: modules[node.target] for node in nodes if node.op == "call_module"}
    return {
        node.target: node.args[0].target
        for node, module in calls.items()
        if isinstance(module, nn.BatchNorm2d)
        and isinstance(calls.get(node.args[0]), nn.Conv2d)
        and len(node.args[0].users) == 1
    }


def narrow(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Give the layers of `network`, in place, the channels of the file's tensors. Their values are still to be loaded.

    A batch norm that the file lacks while its convolution has a bias there was merged into it: `nn.Identity` is left.
    """
    convolutions = norms_after_convolutions(network)
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        if f"{name}.weight" in tensors:
            _shape(module, {key: tensors.get(f"{name}.{key}") for key in ("weight", *module.state_dict(), "bias")})
        elif f"{convolutions.get(name)}.bias" in tensors:
            network.set_submodule(name, nn.Identity())
    return network


def _shape(module: nn.Module, given: dict[str, Tensor | None]) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is None and given["bias"] is not None:
        module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        shape = () if given[key] is None else given[key].shape[: min(2, tensor.dim())]
        if shape and all(theirs <= ours for theirs, ours in zip(shape, tensor.shape, strict=False)):
            empty = tensor.new_empty((*shape, *tensor.shape[2:]))
            setattr(module, key, nn.Parameter(empty, tensor.requires_grad) if key in module._parameters else empty)
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif module.groups == 1:
        module.out_channels, module.in_channels = module.weight.shape[:2]
    else:  # depthwise
        module.out_channels = module.in_channels = module.groups = len(module.weight)


def widths(network: nn.Module) -> dict[str, int]:
    """Convolution or linear layer -> its output channels: what a file says, so that `narrow` may follow its tensors."""
    layers = network.named_modules()
    return {name: len(layer.weight) for name, layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)}


@torch.no_grad()
def misfits_of_widths(network: nn.Module, told: dict[str, int]) -> list[str]:
    """What is wrong with a narrow network: a line each; nothing if it is as wide as `told` and pictures pass."""
    wrong = [
        f"{name} is {told.get(name)} wide by the file's list, {width} by its tensors"
        for name, width in widths(network).items()
        if told.get(name) != width
    ]
    try:
        logits = network.eval()(next(network.parameters()).new_zeros(1, 3, 32, 32))
    except RuntimeError as error:
        return [*wrong, f"its widths do not fit together ({str(error).splitlines()[0]})"]
    classes = getattr(network, "num_classes", logits.shape[1])
    return wrong + [f"{logits.shape[1]} classes, not {classes}"] * (logits.shape[1] != classes)
