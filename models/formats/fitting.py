"""Strict fitting: a file's tensors become a network's weights, all of them or none."""

import copy
import re

import torch
from torch import Tensor, nn

from models.formats.content import Content
from structure import narrow, norms_after_convolutions, widths

SHOWN = 8  # misfits that an error lists


def fill(network: nn.Module, content: Content) -> tuple[dict[str, Tensor], list[str]]:
    """Load what `own.read` returned into the network, in place.

    Returns:
        layer -> the mask that its weight has been multiplied with; and a line for each thing that does not fit. If
        there is such a line, the network is unchanged.
    """
    target = narrow(copy.deepcopy(network), content.tensors) if content.narrow else network
    state, masks, misfits = fit(content.tensors, target)
    if content.narrow and not misfits:
        misfits = misfits_of_widths(target, content.facts.get("widths"))
    shown = misfits[:SHOWN] + [f"... and {len(misfits) - SHOWN} more"] * (len(misfits) > SHOWN)
    contradictions = contradictions_of(content, network)
    if contradictions or shown:
        return {}, contradictions + shown
    if content.narrow:
        narrow(network, content.tensors)
    network.load_state_dict(state)
    for name in content.identities:
        network.set_submodule(name, nn.Identity())
    return masks, []


def contradictions_of(content: Content, network: nn.Module) -> list[str]:
    """A line for each fact about the network that the file contradicts."""
    facts = {"arch": content.arch, "num_classes": content.facts.get("num_classes")}
    return [
        f"the file's {name} is {said}, the network's {getattr(network, name)}"
        for name, said in facts.items()
        if said is not None and hasattr(network, name) and _bare(said) != _bare(getattr(network, name))
    ]


def _bare(value: object) -> str:
    """A name without its spelling: MobileNet-V2, mobilenetv2 and mobilenet_v2 are the same."""
    return re.sub(r"[\W_]", "", str(value).lower())


def fit(tensors: dict[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The network's whole state from the file's tensors, the file's masks by layer, and a line for each misfit.

    The rules for tensors that differ:

    - A linear layer's 2-D weight fits a 1x1 convolution, and the reverse.
    - A convolution before a batch norm may lack its bias, which is zero then, since a batch norm takes any shift away.
    - `num_batches_tracked` may be missing.
    - `<layer>.mask` is multiplied into the layer's weight.
    """
    state = network.state_dict()
    masks = {n.removesuffix(".mask"): t for n, t in tensors.items() if n.endswith(".mask") and n not in state}
    given = {n: t for n, t in tensors.items() if n.removesuffix(".mask") not in masks}
    needless = {f"{conv}.bias" for conv in norms_after_convolutions(network).values()}
    misfits = []

    def fitted(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        if tensor.shape == shape:
            return tensor
        if {tensor.ndim, len(shape)} == {2, 4} and tensor.shape[:2] == shape[:2] and tensor.numel() == shape.numel():
            return tensor.reshape(shape)  # a linear layer and a 1x1 convolution
        misfits.append(f"{name} is {tuple(tensor.shape)} in the file, {tuple(shape)} in the network")
        return tensor

    for name, ours in state.items():
        layer, _, kind = name.rpartition(".")
        if name in given:
            state[name] = fitted(name, given[name], ours.shape)
        elif name in needless and f"{layer}.weight" in given:
            state[name] = torch.zeros_like(ours)
        elif kind != "num_batches_tracked":
            misfits.append(f"missing {name}")
    misfits += [f"unexpected {name}" for name in given if name not in state]

    for layer, mask in masks.items():
        weight = f"{layer}.weight"
        if weight not in state:
            misfits.append(f"unexpected {layer}.mask")
            continue
        masks[layer] = fitted(f"{layer}.mask", mask, network.get_parameter(weight).shape)
        if not misfits:
            state[weight] = state[weight] * masks[layer].to(state[weight].dtype)
    return state, masks, misfits


@torch.no_grad()
def misfits_of_widths(network: nn.Module, listed: dict[str, int] | None) -> list[str]:
    """A line for each thing that is wrong with the widths of a narrow network, which is left in eval mode.

    They must be those that the file lists, if it does, and must fit together: a picture is passed through the network.
    """
    wrong = [
        f"{name} is {listed.get(name)} wide by the file's list, {width} by its tensors"
        for name, width in (widths(network) if listed is not None else {}).items()
        if listed.get(name) != width
    ]
    try:
        logits = network.eval()(next(network.parameters()).new_zeros(1, 3, 32, 32))
    except RuntimeError as error:
        return [*wrong, f"its widths do not fit together ({str(error).splitlines()[0]})"]
    classes = getattr(network, "num_classes", logits.shape[1])
    return wrong + [f"{logits.shape[1]} classes, not {classes}"] * (logits.shape[1] != classes)
