"""Checkpoints: what may stand in a file, and how it becomes a network's weights.

Every rule is declared here. What no rule covers is an error that lists the tensors that do not fit:
- a file is a state_dict, or a dictionary that holds one as `state_dict` or `model`; names may start with `module.`;
- the names of other files are translated: torchvision's, BiP's, ResRep's (`models/names.py`);
- ResRep's compactors are merged with the batch norm and convolution before them; its `.hdf5` files are read by h5py;
- a linear layer's 2-D weight fits a 1x1 convolution, and the reverse;
- a convolution before a batch norm may lack its bias, which is zero then; `num_batches_tracked` may be missing;
- `sub_block1` of BiP's wide ResNets, which nothing computes with, is left out;
- `<layer>.mask` is multiplied into the layer's weight, and so are the stripes' scales, `<layer>.FilterSkeleton`;
- `<layer>.popup_scores` (BiP, Hydra) decide a mask: where the file has that, too, they are left out, and else handed
  on as an extra to the method that can make a network of them;
- a file that says `widths` (layer -> output channels; ResRep: `deps`) is of a narrower network: layers take the shapes
  of its tensors, batch norms that it lacks are gone, their convolution having a bias instead, and `<layer>.value`
  stands for layers that are gone with their branch; so it is for stripe-wise pruning's published `pruned.pth.tar`.
"""

import copy
import os
import re
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from models import skeletons
from models.names import translated
from models.narrow import merge_compactors, misfits_of_widths
from structure import narrow, norms_after_convolutions

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
    tensors, broken, without_relu = skeletons.fold(tensors, network)
    tensors, merged = merge_compactors(tensors, network)
    changed = broken or merged or "widths" in facts or "deps" in facts
    target = narrow(copy.deepcopy(network), tensors) if changed else network
    fitted, masks, misfits = fit(tensors, target)
    if changed and not misfits:
        misfits = misfits_of_widths(target, facts.get("widths"))
    contradictions = [
        f"the file's {key} is {facts[key]}, the network's {getattr(network, key)}"
        for key in (("arch", "num_classes") if source is None else ("num_classes",))  # others have other names
        if key in facts and hasattr(network, key) and bare(facts[key]) != bare(getattr(network, key))
    ]
    if contradictions or misfits:
        shown = misfits[:8] + [f"... and {len(misfits) - 8} more"] * (len(misfits) > 8)
        name = getattr(network, "arch", type(network).__name__)
        raise ValueError(f"{path}: does not fit {name}: {'; '.join(contradictions + shown)}")

    if changed:
        narrow(network, tensors)
    network.load_state_dict(fitted)
    for block in without_relu:
        network.get_submodule(block).relu = nn.Identity()
    extras = {name: tensor for name, tensor in extras.items() if name.rpartition(".")[0] not in masks}
    info = {**facts, "format": source or form, "masks": masks, "extras": extras}
    if source == "torchvision" and "v3" in network.arch:
        info["note"] = V3_NOTE
        warnings.warn(f"{path}: {V3_NOTE}", stacklevel=2)
    return info


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary in the file, on the CPU, read without running any code that the file may hold."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not head:
        raise ValueError(f"{path}: is empty")
    if head == b"\x89HDF\r\n\x1a\n":
        return read_hdf5(path)
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


def read_hdf5(path: str | os.PathLike) -> dict:
    """ResRep's flat file of one data set a tensor, and `deps`, the widths of all convolutions."""
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: an .hdf5 file needs h5py: pip install h5py") from None
    try:
        with h5py.File(path) as file:
            arrays = {name: torch.from_numpy(np.asarray(array)) for name, array in file.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or no flat file of tensors ({str(error).splitlines()[0]})") from None
    deps = arrays.pop("deps", None)
    return {"state_dict": arrays} | ({} if deps is None else {"deps": deps.tolist()})


def plain_facts(container: dict) -> dict:
    """What the container says beside its tensors: numbers, strings, and what pruning kept."""
    values = {k: v.item() if isinstance(v, Tensor) and v.ndim == 0 else v for k, v in container.items()}
    tables = {k: v for k, v in values.items() if isinstance(v, {"kept": dict, "widths": dict, "deps": list}.get(k, ()))}
    return {k: v for k, v in values.items() if isinstance(v, str | int | float)} | tables


def bare(value: object) -> str:
    """MobileNet-V2, mobilenetv2 and mobilenet_v2 are one name."""
    return re.sub(r"[\W_]", "", str(value).lower())


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
