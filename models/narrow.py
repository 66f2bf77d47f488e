"""Networks with fewer channels than their table says, shaped by the tensors of a file."""

import torch
from torch import Tensor, nn

from structure import fuse_batch_norm, fuse_pointwise, norms_after_convolutions, widths

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
        bias = tensors.get(f"{layer}.bias")
        if isinstance(norm, nn.BatchNorm2d):
            weight, bias = fuse_batch_norm(weight, bias, own, norm.eps)
        weight, bias = fuse_pointwise(weight, bias, rows * (rows.norm(dim=1, keepdim=True) >= FORGOTTEN))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{host}.")}
        tensors |= {f"{layer}.weight": weight.float(), f"{layer}.bias": bias.float()}
    return tensors, bool(hosts)


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
