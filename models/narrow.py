"""Networks with fewer channels than their table says, shaped by the tensors of a file."""

import torch
import torch.fx
from torch import Tensor, nn

from models.layers import Constant


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


FORGOTTEN = 1e-5  # the norm of a compactor's row below which ResRep takes it for zero


def merge_compactors(tensors: dict[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """The tensors with every `<layer>.compactor`, a full or diagonal 1x1 convolution, multiplied into what precedes it.

    That is a batch norm with its convolution, or a convolution alone. The convolution is left, with a bias; the rows to
    be forgotten are zero. Also whether there was a compactor.
    """
    tensors, convolutions, modules = dict(tensors), norms_after_convolutions(network), dict(network.named_modules())
    hosts = [name.removesuffix(".compactor.weight") for name in tensors if name.endswith(".compactor.weight")]
    for host in hosts:
        layer, norm = convolutions.get(host, host), modules.get(host)
        own = {key: tensors.get(f"{host}.{key}") for key in ("weight", "bias", "running_mean", "running_var")}
        weight, rows = tensors.get(f"{layer}.weight"), tensors[f"{host}.compactor.weight"].double().flatten(1)
        known = [weight, *own.values()] if isinstance(norm, nn.BatchNorm2d) else [weight]
        if any(tensor is None or len(tensor) != len(rows) for tensor in known) or rows.shape[1] not in (1, len(rows)):
            continue  # what is left over is told as unexpected
        bias = tensors.get(f"{layer}.bias", torch.zeros(len(rows))).double()
        weight = weight.double()
        if isinstance(norm, nn.BatchNorm2d):
            scale = own["weight"].double() / (own["running_var"].double() + norm.eps).sqrt()
            bias = (bias - own["running_mean"].double()) * scale + own["bias"].double()
            weight = weight * scale.view(-1, 1, 1, 1)
        rows = rows * (rows.norm(dim=1, keepdim=True) >= FORGOTTEN)
        both = torch.cat([weight.flatten(1), bias.view(-1, 1)], 1)
        both = (rows * both if rows.shape[1] == 1 else rows @ both).float()
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{host}.")}
        tensors |= {f"{layer}.weight": both[:, :-1].view_as(weight), f"{layer}.bias": both[:, -1]}
    return tensors, bool(hosts)


def narrow(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Give the layers of `network`, in place, the channels of the file's tensors. Their values are still to be loaded.

    A batch norm that the file lacks while its convolution has a bias there was merged into it: `nn.Identity` is left. A
    layer that has a `value` there was removed with its branch: `Constant` is left.
    """
    convolutions = norms_after_convolutions(network)
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        if f"{name}.value" in tensors:
            network.set_submodule(name, Constant(tensors[f"{name}.value"].to(module.weight.device)))
        elif f"{name}.weight" in tensors:
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
def misfits_of_widths(network: nn.Module, told: dict[str, int] | None) -> list[str]:
    """What is wrong with a narrow network: a line each; nothing if pictures pass and it is as wide as `told`, if so."""
    wrong = [
        f"{name} is {(told or {}).get(name)} wide by the file's list, {width} by its tensors"
        for name, width in widths(network).items()
        if told is not None and told.get(name) != width
    ]
    try:
        logits = network.eval()(next(network.parameters()).new_zeros(1, 3, 32, 32))
    except RuntimeError as error:
        return [*wrong, f"its widths do not fit together ({str(error).splitlines()[0]})"]
    classes = getattr(network, "num_classes", logits.shape[1])
    return wrong + [f"{logits.shape[1]} classes, not {classes}"] * (logits.shape[1] != classes)
