"""What the operators of a traced network do to channels: which pass them on, join them or part them."""

import operator

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from structure.plain import SamePadding

CARRY_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Mish,
    nn.Hardtanh, nn.Tanh, nn.Softplus, nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
RESIZE_MODULES = (nn.Upsample, nn.ReflectionPad2d, nn.ReplicationPad2d)  # these invent no pixels
ZERO_PADDING = (nn.ZeroPad2d, SamePadding)
REDUCTIONS = {torch.mean, torch.amax, torch.amin, "mean", "amax", "amin"}  # over the pixels: else they mix channels
RESIZE_CALLS = {F.interpolate, F.upsample}
CARRY_CALLS = REDUCTIONS | {
    F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.leaky_relu, F.elu, F.mish, F.hardtanh, F.softplus,
    F.sigmoid, F.tanh, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    torch.relu, torch.sigmoid, torch.tanh, torch.flatten, torch.clamp, "relu", "relu_", "sigmoid", "sigmoid_", "tanh",
    "flatten", "clamp", "clamp_", "contiguous", "expand_as",
}  # fmt: skip
POOL_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)
POOL_CALLS = REDUCTIONS | {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d}
SUM_CALLS = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCT_CALLS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
NUMBER_CALLS = {operator.truediv, operator.sub, torch.div, torch.sub, "div", "div_", "sub", "sub_"}  # tensor op number
SHAPE_CALLS = {getattr, "size", "dim"}  # these return numbers, not tensors
CAT_CALLS = {torch.cat, torch.concat, torch.concatenate}
SPLIT_CALLS = {torch.split, torch.functional.split, "split"}
CHUNK_CALLS = {torch.chunk, "chunk"}
STOCHASTIC_DEPTH = "stochastic_depth"  # torchvision's, by name: it scales whole pictures, and does nothing in eval mode


def is_in(target: object, calls: set) -> bool:
    return (isinstance(target, str) or callable(target)) and not isinstance(target, nn.Module) and target in calls


def name_of(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def is_layer(module: object) -> bool:
    """Whether it is a linear layer, or a convolution whose filters read more than one channel or could do so."""
    mixes = isinstance(module, nn.Conv2d) and (module.groups == 1 or module.weight.shape[1] > 1)
    return isinstance(module, nn.Linear) or mixes


def is_depthwise(module: object) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels


def is_one_per_channel(target: object) -> bool:
    """Whether it has something of its own for each channel, which it treats by itself."""
    own_slopes = isinstance(target, nn.PReLU) and target.num_parameters > 1
    return is_depthwise(target) or isinstance(target, nn.BatchNorm2d) or own_slopes


def carries(node: torch.fx.Node, target: object, tensors: int) -> bool:
    """Whether the operator, which reads so many `tensors`, treats every channel by itself, and in the same way."""
    if is_in(target, REDUCTIONS):
        dims = argument(node, 1, "dim")
        dims = dims if isinstance(dims, tuple | list) else (dims,)
        return all(dim in (2, 3, -1, -2) for dim in dims)
    if is_in(target, NUMBER_CALLS):
        return tensors == 1 and isinstance(node.args[0], torch.fx.Node)
    if target is F.pad:
        return isinstance(pads := argument(node, 1, "pad"), list | tuple) and len(pads) <= 4  # of pixels only
    if target is operator.getitem:
        return _channel_slice(node) == slice(None)
    if isinstance(target, nn.PReLU):
        return target.num_parameters == 1
    if isinstance(target, CARRY_MODULES + RESIZE_MODULES + ZERO_PADDING) or is_in(target, CARRY_CALLS | RESIZE_CALLS):
        return True
    return name_of(target) == STOCHASTIC_DEPTH or _is_flattening_view(node)


def value_of(network: nn.Module, node: torch.fx.Node) -> torch.Tensor:
    """The parameter or buffer that a node of the kind `get_attr` reads."""
    owner, _, name = node.target.rpartition(".")
    return getattr(network.get_submodule(owner), name)


def needs_shape(node: torch.fx.Node) -> bool:
    """Whether the operator, which is no module, could fail if what it reads had but one channel and pixel."""
    is_call = node.op in ("call_function", "call_method") and not is_in(node.target, SHAPE_CALLS)
    return is_call and not (is_in(node.target, SUM_CALLS | PRODUCT_CALLS) or carries(node, node.target, 1))


def argument(node: torch.fx.Node, place: int, name: str, default: object = None) -> object:
    """An argument of the call, by place or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def concatenated(node: torch.fx.Node, target: object) -> object:
    """What a concatenation over channels joins, in order; nothing if the operator is none."""
    is_one = is_in(target, CAT_CALLS) and argument(node, 1, "dim", 0) in (1, -3)
    return argument(node, 0, "tensors") if is_one else ()


def parted(node: torch.fx.Node, target: object, channels: int) -> list[tuple[int, int]] | None:
    """The pieces (first channel, one behind the last) of so many `channels`; None if the operator parts no channels."""
    if is_in(target, CHUNK_CALLS) and argument(node, 2, "dim", 0) in (1, -3):
        number = argument(node, 1, "chunks")
        sizes = -(-channels // number) if isinstance(number, int) else None
    elif is_in(target, SPLIT_CALLS) and argument(node, 2, "dim", 0) in (1, -3):
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get("split_size_or_sections")
        sizes = node.kwargs.get("split_size", sizes)
    else:
        return None
    if isinstance(sizes, int):
        sizes = [min(sizes, channels - start) for start in range(0, channels, sizes)]
    if not isinstance(sizes, list | tuple) or not all(isinstance(size, int) for size in sizes):
        return None
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return list(zip([0, *ends], ends, strict=False)) if ends[-1] == channels else None


def sliced(node: torch.fx.Node, target: object, channels: int) -> tuple[int, int] | None:
    """The channels that `x[:, a:b]` takes of so many: (first, one behind the last); None if it is something else."""
    chosen = _channel_slice(node) if target is operator.getitem else None
    if chosen is None or any(not isinstance(end, int | None) for end in (chosen.start, chosen.stop, chosen.step)):
        return None
    start, stop, step = chosen.indices(channels)
    return (start, stop) if step == 1 and start < stop else None


def _channel_slice(node: torch.fx.Node) -> slice | None:
    """What `x[:, ...]` takes of the channels, where it takes nothing but slices; None if it does something else."""
    index = node.args[1] if len(node.args) > 1 else None
    if not isinstance(index, tuple) or not all(isinstance(part, slice) for part in index):
        return None
    return index[1] if len(index) > 1 else slice(None)


def _is_flattening_view(node: torch.fx.Node) -> bool:
    """`x.view(batch, -1)` and `x.reshape(batch, -1)`."""
    return node.op == "call_method" and node.target in ("view", "reshape") and node.args[2:] == (-1,)
