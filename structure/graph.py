"""Which layers read which channels, found by tracing the network.

Tensors whose channels must keep one common order form a *channel space*. The outputs of a convolution or linear layer
form a new space. Batch norms, activations, pooling and depthwise convolutions pass a space on. Additions and
multiplications unite the spaces of their operands. The image, the logits and every operator that is not listed here fix
the order of the channels that they read or write.
"""

import operator
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from structure.capture import evaluating

CARRY_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Dropout,
    nn.Dropout2d, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
REDUCTIONS = {torch.mean, torch.amax, torch.amin, "mean", "amax", "amin"}  # over the pixels: else they mix channels
CARRY_CALLS = REDUCTIONS | {
    F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.leaky_relu, F.dropout, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.relu, torch.sigmoid, torch.flatten, torch.clamp,
    "relu", "relu_", "sigmoid", "flatten", "clamp", "contiguous",
}  # fmt: skip
POOL_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)
POOL_CALLS = REDUCTIONS | {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d}
SUM_CALLS = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCT_CALLS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
SHAPE_CALLS = {getattr, "size", "dim"}  # these return numbers, not tensors
# This reason forbids another order for one layer alone. It does not forbid one for all layers of the space together.
SUM = "a residual sum"
LOGITS = "the logits"


@dataclass(eq=False)
class Space:
    """Tensors whose channels share one order."""

    channels: int | None = None  # how many; None if no layer produces them
    producers: list[str] = field(default_factory=list)  # convolutions and linear layers that write the channels
    carriers: list[str] = field(default_factory=list)  # batch norms and depthwise layers, which treat each by itself
    consumers: list[str] = field(default_factory=list)  # convolutions and linear layers that read the channels
    fixed: set[str] = field(default_factory=set)  # reasons why their order must stay; empty if any order will do
    scaled: bool = False  # two tensors of this space are multiplied with each other (squeeze-excite)

    def absorb(self, other: "Space") -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            if isinstance(mine, list):
                mine.extend(theirs)
        self.fixed |= other.fixed
        self.scaled |= other.scaled
        self.channels = self.channels or other.channels


class _Tracer(torch.fx.Tracer):
    failed = ""  # the innermost module that could not be traced

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(module)
            raise


class Graph:
    """The traced structure of a network whose layers are modules of `torch.nn`.

    Attributes:
        traced: the network as a `torch.fx.Graph`.
        nodes: those of `traced`.
        modules: `dict(network.named_modules())`.
        layers: every convolution of one group and every linear layer by name, in `named_modules()` order.
        stem: names of the layers that read the image.
        head: names of the layers behind the last pooling: the classifier.
        output: layer name -> the `Space` of its output channels. Layers that are never called are missing.
        input: layer name -> the `Space` of its input channels.

    Raises:
        ValueError: the network cannot be traced symbolically (control flow that depends on data), returns something
            else than one tensor, or has a batch norm without running statistics, under which the logits of a picture
            depend on the others in its batch.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.modules = dict(network.named_modules())
        tracer = _Tracer()
        try:
            with evaluating(network):  # code that asks whether it is trained is traced as it evaluates
                self.traced = tracer.trace(network)
        except Exception as error:  # torch.fx raises many kinds of errors
            raise ValueError(_untraceable(network, tracer.failed, error)) from None
        self.nodes = self.traced.nodes
        self.layers = {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        }
        self.stem: set[str] = set()
        self.input: dict[str, Space] = {}
        self.output: dict[str, Space] = {}
        self._spaces: dict[torch.fx.Node, Space] = {}
        self._merged: dict[Space, Space] = {}
        for node in self.nodes:
            self._visit(node)
        self._fix_tensors_in_two_places()
        self.input = {name: self._find(space) for name, space in self.input.items()}
        self.output = {name: self._find(space) for name, space in self.output.items()}
        self.head = self._behind_last_pooling()

    def masked_layers(self) -> dict[str, nn.Module]:
        """The layers that pruning may touch: all but the stem, depthwise and grouped convolutions."""
        return {name: layer for name, layer in self.layers.items() if name not in self.stem and name in self.output}

    def norm_after(self, name: str) -> str | None:
        """The name of the batch norm that alone reads the output of the layer, if there is one."""
        users = next((node.users for node in self.nodes if node.op == "call_module" and node.target == name), ())
        norms = [user.target for user in users if isinstance(self.modules.get(user.target), nn.BatchNorm2d)]
        return norms[0] if len(norms) == len(users) == 1 else None

    def bypassed(self, name: str) -> bool:
        """Whether a path from the image to the logits leads around the layer."""
        reached = set()
        for node in self.nodes:
            if node.op == "placeholder" or (node.target != name and not reached.isdisjoint(node.all_input_nodes)):
                reached.add(node)
        return any(node.op == "output" for node in reached)

    def _visit(self, node: torch.fx.Node) -> None:
        sources = [source for source in node.all_input_nodes if source in self._spaces]
        target = self.modules[node.target] if node.op == "call_module" else node.target
        if node.op == "placeholder":
            self._spaces[node] = Space(fixed={"the image"})
        elif node.op == "get_attr":
            self._spaces[node] = Space(fixed={f"the tensor {node.target}"})
        elif node.op == "output":
            if not isinstance(node.args[0], torch.fx.Node):
                kind = type(node.args[0]).__name__.removeprefix("immutable_")
                raise ValueError(f"{type(self.network).__name__} returns a {kind}: it must return the logits alone")
            for source in sources:
                self._space(source).fixed.add(LOGITS)
        elif isinstance(target, _BatchNorm) and target.running_mean is None:
            raise ValueError(f"{node.target}: a batch norm without running statistics (track_running_stats=False)")
        elif node.target in self.layers and node.op == "call_module":
            self._visit_layer(node, node.all_input_nodes[0])
        elif _is_one_per_channel(target) and sources:
            space = self._space(sources[0])
            space.carriers.append(node.target)
            self._spaces[node] = space
        elif sources and _carries(node, target):
            self._spaces[node] = self._space(sources[0])
        elif (_is_in(target, SUM_CALLS) or _is_in(target, PRODUCT_CALLS)) and sources:
            space = self._space(sources[0])
            for source in sources[1:]:
                space = self._union(space, self._space(source))
            if _is_in(target, SUM_CALLS) and len(sources) > 1:
                space.fixed.add(SUM)
            space.scaled |= _is_in(target, PRODUCT_CALLS) and len(sources) > 1
            self._spaces[node] = space
        elif not _is_in(target, SHAPE_CALLS) and sources:
            reason = f"operator {_name(target)}"
            for source in sources:
                self._space(source).fixed.add(reason)
            self._spaces[node] = Space(fixed={reason})

    def _visit_layer(self, node: torch.fx.Node, source: torch.fx.Node) -> None:
        name, layer, before = node.target, self.layers[node.target], self._space(source)
        if source.op == "placeholder":
            self.stem.add(name)
        if name in self.output:  # the layer is called twice: another order at one place would be wrong at the other
            before.fixed.add("shared weights")
            self._find(self.output[name]).fixed.add("shared weights")
        before.consumers.append(name)
        after = Space(
            layer.weight.shape[0], producers=[name], fixed={"shared weights"} if name in self.output else set()
        )
        self.input[name], self.output[name] = before, after
        self._spaces[node] = after

    def _fix_tensors_in_two_places(self) -> None:
        """Another order of a tensor that two modules share, or that is read beside its module, would be wrong there."""
        owners: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append(name)
        shared = {name for names in owners.values() if len(names) > 1 for name in names}
        shared |= {node.target.rpartition(".")[0] for node in self.nodes if node.op == "get_attr"}
        for space in {self._find(space) for space in [*self._spaces.values(), *self.input.values()]}:
            if not shared.isdisjoint([*space.producers, *space.carriers, *space.consumers]):
                space.fixed.add("shared weights")

    def _space(self, node: torch.fx.Node) -> Space:
        """That of the node's tensor. What was made from numbers alone has one that nobody else has."""
        return self._find(self._spaces.setdefault(node, Space(fixed={"a tensor made of numbers"})))

    def _find(self, space: Space) -> Space:
        while space in self._merged:
            space = self._merged[space]
        return space

    def _union(self, a: Space, b: Space) -> Space:
        if a is not b:
            if a.channels and b.channels and a.channels != b.channels:
                a.fixed.add("a broadcast over channels")
            a.absorb(b)
            self._merged[b] = a
        return a

    def _behind_last_pooling(self) -> set[str]:
        head, seen = set(), set()
        queue = [node for node in self.nodes if node.op == "output"]
        while queue:
            node = queue.pop()
            if node in seen:
                continue
            seen.add(node)
            target = self.modules[node.target] if node.op == "call_module" else node.target
            if isinstance(target, POOL_MODULES) or (_is_in(target, POOL_CALLS) and _carries(node, target)):
                continue
            if node.op == "call_module" and node.target in self.layers:
                head.add(node.target)
            queue.extend(node.all_input_nodes)
        return head


def norms_after_convolutions(network: nn.Module) -> dict[str, str]:
    """Batch norm -> the convolution whose output it alone reads, by name; empty if the network cannot be traced."""
    try:
        graph = Graph(network)
    except ValueError:
        return {}
    convolutions = [name for name, module in graph.modules.items() if isinstance(module, nn.Conv2d)]
    return {norm: name for name in convolutions if (norm := graph.norm_after(name))}


def _untraceable(network: nn.Module, module: str, error: Exception) -> str:
    """Where the network cannot be traced and why, in one line."""
    torch_folder = Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if torch_folder not in Path(frame.filename).parents and frame.filename != __file__
    ]
    where = f", module {module}" if module else ""
    where += f", line {frames[-1].lineno} of {frames[-1].filename} ({frames[-1].line})" if frames else ""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return f"cannot trace {type(network).__name__}{where}: {reason}"


def _is_in(target: object, calls: set) -> bool:
    return (isinstance(target, str) or callable(target)) and not isinstance(target, nn.Module) and target in calls


def _is_one_per_channel(target: object) -> bool:
    depthwise = isinstance(target, nn.Conv2d) and target.groups == target.in_channels == target.out_channels
    return depthwise or isinstance(target, nn.BatchNorm2d)


def _carries(node: torch.fx.Node, target: object) -> bool:
    """Whether the operator treats every channel by itself, and in the same way."""
    if _is_in(target, REDUCTIONS):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = dims if isinstance(dims, tuple | list) else (dims,)
        return all(dim in (2, 3, -1, -2) for dim in dims)
    return isinstance(target, CARRY_MODULES) or _is_in(target, CARRY_CALLS) or _is_flattening_view(node)


def _is_flattening_view(node: torch.fx.Node) -> bool:
    """`x.view(batch, -1)` and `x.reshape(batch, -1)`."""
    return node.op == "call_method" and node.target in ("view", "reshape") and node.args[2:] == (-1,)


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
