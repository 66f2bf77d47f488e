"""Strict fitting: a file's tensors become a network's weights, all of them or none."""

import copy
import re
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor, nn

from models.formats.content import Content
from structure import LOGITS, Graph, narrow, norms_after_convolutions, widths

SHOWN = 8  # misfits that an error lists


def fill(network: nn.Module, content: Content, classes: list[str] | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Load what `own.read` returned into the network, in place.

    Args:
        classes: what the network is to tell apart, in order; None if nobody knows.

    Returns:
        layer -> the mask that its weight has been multiplied with; and a line for each thing that does not fit. If
        there is such a line, the network is unchanged.
    """
    target = narrow(copy.deepcopy(network), content.tensors) if content.narrow else network
    state, masks, misfits = fit(content.tensors, target)
    if content.narrow and not misfits:
        misfits = misfits_of_widths(target, content.facts.get("widths"))
    shown = misfits[:SHOWN] + [f"... and {len(misfits) - SHOWN} more"] * (len(misfits) > SHOWN)
    contradictions = contradictions_of(content, network) + difference(content.facts.get("classes"), classes)
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
    facts["arch_options"] = content.facts.get("arch_options")
    return [
        f"the file's {name} is {said}, the network's {getattr(network, name)}"
        for name, said in facts.items()
        if said is not None and hasattr(network, name) and _bare(said) != _bare(getattr(network, name))
    ]


def difference(theirs: list[str] | None, ours: list[str] | None) -> list[str]:
    """A line that names the first differences between the file's classes and the data's; none if one is not known."""
    theirs = [str(name) for name in theirs or ()]
    if not theirs or ours is None or theirs == list(ours):
        return []
    sides = (("the file", set(theirs) - set(ours)), ("the data", set(ours) - set(theirs)))
    told = [f"only {who} has {', '.join(sorted(names)[:5])}" for who, names in sides if names]
    if not told:
        pairs = enumerate(zip_longest(theirs, ours, fillvalue="nothing"))
        told = [f"number {n} is {a} in the file, {b} in the data" for n, (a, b) in pairs if a != b][:1]
    return [f"the file's classes are not those of the data: {' and '.join(told)}"]


def with_fresh_classifier(content: Content, network: nn.Module, classes: list[str] | None) -> Content:
    """The content with the network's own classifier in place of one for other classes; all else stays.

    Raises:
        ValueError: it has one, but the network has no single layer that writes the logits.
    """
    name = classifier(network)
    ours, theirs = network.get_submodule(name), content.tensors.get(f"{name}.weight")
    known = difference(content.facts.get("classes"), classes)
    if theirs is None or theirs.dim() < 2 or (len(theirs) == len(ours.weight) and not known):
        return content
    tensors = {key: tensor for key, tensor in content.tensors.items() if not key.startswith(f"{name}.")}
    tensors[f"{name}.weight"] = ours.weight.detach()[:, : theirs.shape[1]].clone()  # the file's network may be narrower
    if ours.bias is not None:
        tensors[f"{name}.bias"] = ours.bias.detach().clone()
    facts = {key: fact for key, fact in content.facts.items() if key not in ("num_classes", "classes")}
    if "widths" in facts:
        facts["widths"] = facts["widths"] | {name: len(ours.weight)}
    extras = {key: tensor for key, tensor in content.extras.items() if not key.startswith(f"{name}.")}
    remark = f"its classifier {name} of {len(theirs)} classes is left out: one of {len(ours.weight)} starts anew"
    return replace(content, tensors=tensors, facts=facts, extras=extras, remarks=[*content.remarks, remark])


def classifier(network: nn.Module) -> str:
    """The name of the layer that writes the logits. Raises ValueError if there is not exactly one."""
    writers = {name for name, space in Graph(network).output.items() if LOGITS in space.fixed}
    if len(writers) != 1:
        raise ValueError(f"{type(network).__name__}: no single layer writes its logits, so none can start anew")
    return writers.pop()


def _bare(value: object) -> str:
    """A name without its spelling: MobileNet-V2, mobilenetv2 and mobilenet_v2 are the same.

    So are a network's name with and without its library, and a file of Python wherever it stands.
    """
    value = value.rpartition("/")[2] if isinstance(value, str) else value
    return re.sub(r"[\W_]", "", str(value).lower())


def fit(tensors: dict[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The network's whole state from the file's tensors, the file's masks by layer, and a line for each misfit.

    The rules for tensors that differ:

    - A linear layer's 2-D weight fits a 1x1 convolution, and the reverse.
    - A convolution before a batch norm may lack its bias, which is zero then, since a batch norm takes any shift away.
    - `num_batches_tracked` may be missing.
    - `<layer>.mask` is multiplied into the layer's weight.

    Weights that are integers or not finite do not fit, nor do masks of other numbers than 0 and 1.
    """
    state = network.state_dict()
    masks = {n.removesuffix(".mask"): t for n, t in tensors.items() if n.endswith(".mask") and n not in state}
    given = {n: t for n, t in tensors.items() if n.removesuffix(".mask") not in masks}
    needless = {f"{conv}.bias" for conv in norms_after_convolutions(network).values()}
    misfits = []

    def fitted(name: str, tensor: Tensor, ours: Tensor) -> Tensor:
        shape = ours.shape
        axes = {tensor.ndim, len(shape)} == {2, 4}  # a linear layer and a 1x1 convolution
        if tensor.shape != shape and not (axes and tensor.shape[:2] == shape[:2] and tensor.numel() == shape.numel()):
            misfits.append(f"{name} is {tuple(tensor.shape)} in the file, {tuple(shape)} in the network")
            return tensor
        if ours.is_floating_point() and not name.endswith(".mask"):
            if not tensor.is_floating_point():
                misfits.append(f"{name} holds {str(tensor.dtype).removeprefix('torch.')} in place of weights")
            elif wrong := int((~(values := tensor.to(ours.dtype)).isfinite()).sum()):
                misfits.append(f"{name} has {wrong} numbers that are not finite")
            elif name.endswith("running_var") and (values < 0).any():
                misfits.append(f"{name} has variances below zero")
        return tensor.reshape(shape)

    for name, ours in state.items():
        layer, _, kind = name.rpartition(".")
        if name in given:
            state[name] = fitted(name, given[name], ours)
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
        masks[layer] = fitted(f"{layer}.mask", mask, network.get_parameter(weight))
        if not misfits and not ((mask == 0) | (mask == 1)).all():
            misfits.append(f"{layer}.mask holds other numbers than 0 and 1")
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
    for side in (32, 96):  # the smaller one is too small for some networks
        try:
            logits = network.eval()(next(network.parameters()).new_zeros(1, 3, side, side))
            break
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    else:
        return [*wrong, f"its widths do not fit together ({reason})"]
    classes = getattr(network, "num_classes", logits.shape[1])
    return wrong + [f"{logits.shape[1]} classes, not {classes}"] * (logits.shape[1] != classes)
