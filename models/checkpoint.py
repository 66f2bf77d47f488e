"""Checkpoints: what may stand in a file, and how it becomes a network's weights.

Every rule is declared here. What no rule covers is an error that lists the tensors that do not fit:
- a file is a state_dict, or a dictionary that holds one as `state_dict` or `model`; names may start with `module.`;
- torchvision's own names are translated, and those of BiP's ResNets in CIFAR form (`FOREIGN`);
- a linear layer's 2-D weight fits a 1x1 convolution, and the reverse;
- a convolution before a batch norm may lack its bias, which is zero then; `num_batches_tracked` may be missing;
- `sub_block1` of BiP's wide ResNets, which nothing computes with, is left out;
- `<layer>.mask` is multiplied into the layer's weight;
- `<layer>.popup_scores` (BiP, Hydra) decide a mask: where the file has that, too, they are left out, and else handed
  on as an extra to the method that can make a network of them;
- a file that says `widths` (layer -> output channels) is of a narrower network: layers take the shapes of its tensors,
  and batch norms that it lacks are gone, their convolution having a bias instead.
"""

import copy
import os
import re
import warnings

import torch
from torch import Tensor, nn

from models.narrow import misfits_of_widths, narrow, norms_after_convolutions

TORCHVISION_V3 = (
    "features.1.block.0.0.weight",
    (
        (r"features\.1\.block\.0\.([01])", r"features.1.conv.\1"),  # depthwise: the first block does not expand
        (r"features\.1\.block\.1\.fc([12])", lambda m: f"features.1.conv.3.fc.{2 * int(m[1]) - 2}"),
        (r"features\.1\.block\.[12]\.([01])", lambda m: f"features.1.conv.{4 + int(m[1])}"),  # project
        (r"features\.(\d+)\.block\.0\.([01])", r"features.\1.conv.\2"),  # expand
        (r"features\.(\d+)\.block\.1\.([01])", lambda m: f"features.{m[1]}.conv.{3 + int(m[2])}"),  # depthwise
        (r"features\.(\d+)\.block\.2\.fc([12])", lambda m: f"features.{m[1]}.conv.5.fc.{2 * int(m[2]) - 2}"),
        (r"features\.(\d+)\.block\.[23]\.([01])", lambda m: f"features.{m[1]}.conv.{7 + int(m[2])}"),  # project
        (r"features\.1[26]\.([01])", r"conv.\1"),  # the 1x1 convolution after the last block
    ),
)
BIP = ("linear.weight", ((r"linear", "fc"), (r"(layer\d\.\d+)\.shortcut\.([01])", r"\1.downsample.\2")))
# arch -> (whose names, a name that only their file has, rows of (their name, ours), the first that fits counts);
# the other networks have the names of torchvision or their publication already
FOREIGN = {
    "mobilenet_v2": (
        "torchvision",
        "features.1.conv.0.0.weight",
        (
            (r"features\.1\.conv\.0\.([01])", r"features.1.conv.\1"),  # depthwise: the first block does not expand
            (r"features\.1\.conv\.([12])", lambda m: f"features.1.conv.{2 + int(m[1])}"),  # project
            (r"features\.(\d+)\.conv\.0\.([01])", r"features.\1.conv.\2"),  # expand
            (r"features\.(\d+)\.conv\.1\.([01])", lambda m: f"features.{m[1]}.conv.{3 + int(m[2])}"),  # depthwise
            (r"features\.(\d+)\.conv\.([23])", lambda m: f"features.{m[1]}.conv.{4 + int(m[2])}"),  # project
        ),
    ),
    "mobilenet_v3_large": ("torchvision", *TORCHVISION_V3),
    "mobilenet_v3_small": ("torchvision", *TORCHVISION_V3),
    **{f"resnet{depth}_cifar": ("bip", *BIP) for depth in (18, 34, 50)},
}
UNUSED = "sub_block1."
EXTRAS = (".popup_scores",)  # tensors that belong to a pruning method
V3_NOTE = (
    "torchvision's MobileNetV3 squeezes after the activation, with a batch norm epsilon of 1e-3; this one squeezes "
    "before it, with 1e-5: the weights fit and are a start for training, but do not give torchvision's accuracy"
)


def load_checkpoint(network: nn.Module, path: str | os.PathLike) -> dict:
    """Fill `network` from the file, every tensor or none; returns what the file said about itself, and its masks.

    The result has `format` ("state_dict" and "model" are containers, "flat", or whose names were translated), `masks`
    (layer -> mask, already multiplied into the weights), `extras` (name -> tensor that only a pruning method
    understands), the container's plain values (arch, epoch, best_prec1, kept, ...), and a `note` where the weights fit
    but do not compute the same function.
    """
    container = read_checkpoint(path)
    form = next((key for key in ("state_dict", "model") if isinstance(container.get(key), dict)), "flat")
    tensors = container if form == "flat" else container[form]
    facts = {} if form == "flat" else plain_facts(container)
    strays = [str(name) for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strays or not tensors:
        raise ValueError(f"{path}: no state_dict in it ({strays[0] + ' is no tensor' if strays else 'nothing at all'})")

    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNUSED)}
    source, tensors = translated(tensors, getattr(network, "arch", None))
    extras = {name: tensors.pop(name) for name in list(tensors) if name.endswith(EXTRAS)}
    told = facts.get("widths")
    target = network if told is None else narrow(copy.deepcopy(network), tensors)
    fitted, masks, misfits = fit(tensors, target)
    if told is not None and not misfits:
        misfits = misfits_of_widths(target, told)
    contradictions = [
        f"the file's {key} is {facts[key]}, the network's {getattr(network, key)}"
        for key in (("arch", "num_classes") if source is None else ("num_classes",))  # others have other names
        if key in facts and hasattr(network, key) and bare(facts[key]) != bare(getattr(network, key))
    ]
    if contradictions or misfits:
        shown = misfits[:8] + [f"... and {len(misfits) - 8} more"] * (len(misfits) > 8)
        name = getattr(network, "arch", type(network).__name__)
        raise ValueError(f"{path}: does not fit {name}: {'; '.join(contradictions + shown)}")

    if target is not network:
        narrow(network, tensors)
    network.load_state_dict(fitted)
    extras = {name: tensor for name, tensor in extras.items() if name.rpartition(".")[0] not in masks}
    info = {**facts, "format": source or form, "masks": masks, "extras": extras}
    if source and "v3" in network.arch:
        info["note"] = V3_NOTE
        warnings.warn(f"{path}: {V3_NOTE}", stacklevel=2)
    return info


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary in the file, on the CPU, read without running any code that the file may hold."""
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if empty:
        raise ValueError(f"{path}: is empty")
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises a dozen types: RuntimeError, KeyError, EOFError, OSError, ...
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"holds {foreign[1]}, which only code could rebuild" if foreign else "truncated, or no checkpoint"
        raise ValueError(f"{path}: {reason} (code in a checkpoint is never run)") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary")
    return content


def plain_facts(container: dict) -> dict:
    """What the container says beside its tensors: numbers, strings, and what pruning kept."""
    values = {k: v.item() if isinstance(v, Tensor) and v.ndim == 0 else v for k, v in container.items()}
    return {
        k: v
        for k, v in values.items()
        if isinstance(v, str | int | float) or (isinstance(v, dict) and k in ("kept", "widths"))
    }


def bare(value: object) -> str:
    """MobileNet-V2, mobilenetv2 and mobilenet_v2 are one name."""
    return re.sub(r"[\W_]", "", str(value).lower())


def translated(tensors: dict[str, Tensor], arch: str | None) -> tuple[str | None, dict[str, Tensor]]:
    """Whose names the tensors have, if they are foreign, and the tensors under ours."""
    source, sign, rows = FOREIGN.get(arch, (None, None, ()))
    if sign not in tensors:
        return None, tensors

    def ours(name: str) -> str:
        layer, _, tensor = name.rpartition(".")
        row = next((row for row in rows if re.fullmatch(row[0], layer)), None)
        return f"{re.sub(*row, layer)}.{tensor}" if row else name

    return source, {ours(name): tensor for name, tensor in tensors.items()}


def fit(tensors: dict[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The network's whole state from the file's tensors, the file's masks by layer, and a line for each misfit."""
    state = network.state_dict()
    masks = {n.removesuffix(".mask"): t for n, t in tensors.items() if n.endswith(".mask") and n not in state}
    given = {n: t for n, t in tensors.items() if n.removesuffix(".mask") not in masks}
    needless = {f"{conv}.bias" for conv in norms_after_convolutions(network).values()}  # a norm takes any shift away
    misfits = []

    def fitted(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        if tensor.shape == shape:
            return tensor
        if {tensor.ndim, len(shape)} == {2, 4} and tensor.shape[:2] == shape[:2] and tensor.numel() == shape.numel():
            return tensor.reshape(shape)  # a linear layer, and the 1x1 convolution that is the same
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
