"""Which layers read which channels, found by tracing the network.

Tensors whose channels must keep one common order form a *channel space*. The outputs of a convolution or linear layer
form a new space. Batch norms, activations, pooling and depthwise convolutions pass a space on. Additions and
multiplications unite the spaces of their operands. A concatenation puts spaces one after another, so that a tensor may
have the channels of several; a split takes them apart again. The image, the logits, grouped convolutions and every
operator that is not listed in `structure.operators` fix the order of the channels that they read or write.
"""

import operator
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from structure import operators
from structure.capture import evaluating
from structure.operators import POOL_CALLS, POOL_MODULES, PRODUCT_CALLS, SHAPE_CALLS, SUM_CALLS, carries, is_in, name_of
from structure.plain import SamePadding
from structure.spaces import GROUPS, LOGITS, SUM, Space, Spaces


class _Tracer(torch.fx.Tracer):
    failed = ""  # the innermost module that could not be traced

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm | SamePadding)
        return ours or super().is_leaf_module(module, name)

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
        layers: every linear layer and every convolution but depthwise ones by name, in `named_modules()` order.
        stem: names of the layers that read the image.
        head: names of the layers behind the last pooling: the classifier. Where no layer stands before a pooling, the
            layers that write the network's output.
        output: layer name -> the `Space` of its output channels. Layers that are never called are missing.
        input: layer name -> the spaces of its input channels, one after another.
        carried: batch norm or depthwise layer -> the spaces of its channels, one after another.

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
        self.layers = {name: module for name, module in self.modules.items() if operators.is_layer(module)}
        self.stem: set[str] = set()
        self.input: dict[str, Spaces] = {}
        self.carried: dict[str, Spaces] = {}
        self.output: dict[str, Space] = {}
        self._spaces: dict[torch.fx.Node, Spaces] = {}
        self._pieces: dict[torch.fx.Node, list[Spaces]] = {}
        self._merged: dict[Space, Space] = {}
        for node in self.nodes:
            self._visit(node)
        self._fix_tensors_in_two_places()
        self.input = {name: self._found(spaces) for name, spaces in self.input.items()}
        self.carried = {name: self._found(spaces) for name, spaces in self.carried.items()}
        self.output = {name: self._find(space) for name, space in self.output.items()}
        self.head = self._behind_last_pooling()

    def masked_layers(self) -> dict[str, nn.Module]:
        """The layers that pruning may touch: all but the stem and depthwise convolutions."""
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

    def rows(self, name: str) -> Spaces:
        """The spaces of what a layer or batch norm writes, one after another."""
        return self.carried[name] if name in self.carried else (self.output[name],)

    def norms_of(self, space: Space) -> list[str]:
        """The batch norms that carry the channels of the space and no others."""
        norms = [name for name in space.carriers if isinstance(self.modules[name], nn.BatchNorm2d)]
        return [name for name in norms if self.carried[name] == (space,)]

    def _visit(self, node: torch.fx.Node) -> None:
        sources = [source for source in node.all_input_nodes if source in self._spaces]
        target = self.modules[node.target] if node.op == "call_module" else node.target
        if node.op == "placeholder":
            self._spaces[node] = (Space(3, fixed={"the image"}),)
        elif node.op == "get_attr":
            if operators.value_of(self.network, node).numel() > 1:  # else it is a number, the same for all channels
                self._spaces[node] = (Space(fixed={f"the tensor {node.target}"}),)
        elif node.op == "output":
            if not isinstance(node.args[0], torch.fx.Node):
                kind = type(node.args[0]).__name__.removeprefix("immutable_")
                raise ValueError(f"{type(self.network).__name__} returns a {kind}: it must return the logits alone")
            for source in sources:
                self._fix(self._of(source), LOGITS)
        elif isinstance(target, _BatchNorm) and target.running_mean is None:
            raise ValueError(f"{node.target}: a batch norm without running statistics (track_running_stats=False)")
        elif node.target in self.layers and node.op == "call_module":
            self._visit_layer(node, node.all_input_nodes[0])
        elif operators.is_one_per_channel(target) and sources:
            spaces = self._of(sources[0])
            if len(spaces) > 1 and None in [space.channels for space in spaces]:
                self._fix(spaces, "operator cat")
            for space in dict.fromkeys(spaces):
                space.carriers.append(node.target)
            self._spaces[node] = self.carried[node.target] = spaces
        elif self._visit_parts(node, target):
            pass
        elif sources and carries(node, target, len(sources)):
            self._spaces[node] = self._of(sources[0])
        elif (is_in(target, SUM_CALLS) or is_in(target, PRODUCT_CALLS)) and sources:
            spaces = self._of(sources[0])
            for source in sources[1:]:
                spaces = self._tie(spaces, self._of(source))
            for space in spaces if len(sources) > 1 else ():
                space.fixed |= {SUM} if is_in(target, SUM_CALLS) else set()
                space.scaled |= is_in(target, PRODUCT_CALLS)
            self._spaces[node] = spaces
        elif not is_in(target, SHAPE_CALLS) and sources:
            reason = f"operator {name_of(target)}"
            for source in sources:
                self._fix(self._of(source), reason)
            self._spaces[node] = (Space(fixed={reason}),)

    def _visit_layer(self, node: torch.fx.Node, source: torch.fx.Node) -> None:
        name, layer, before = node.target, self.layers[node.target], self._of(source)
        after = Space(layer.weight.shape[0], producers=[name])
        if source.op == "placeholder":
            self.stem.add(name)
        if name in self.output:  # the layer is called twice: another order at one place would be wrong at the other
            self._fix((*before, after, self._find(self.output[name])), "shared weights")
        if getattr(layer, "groups", 1) > 1:
            self._fix((*before, after), GROUPS)
        read = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        if len(before) > 1 and sum(space.channels or 0 for space in before) != read:  # or flattened in unequal ways
            self._fix(before, "operator cat")
        for space in before:
            space.consumers.append(name)
        self.input[name], self.output[name] = before, after
        self._spaces[node] = (after,)

    def _visit_parts(self, node: torch.fx.Node, target: object) -> bool:
        """Visit what joins channels or takes them apart; False if the operator does neither."""
        joined = operators.concatenated(node, target)
        if isinstance(joined, torch.fx.Node):  # a split, whose pieces are joined again
            if joined in self._pieces:
                self._spaces[node] = tuple(space for piece in self._pieces[joined] for space in piece)
            return joined in self._pieces
        if joined and all(part in self._spaces for part in joined):
            self._spaces[node] = tuple(space for part in joined for space in self._of(part))
            return True
        source = node.args[0] if node.args else None
        if isinstance(source, torch.fx.Node) and source in self._pieces and target is operator.getitem:
            chosen = self._pieces[source][node.args[1]]
            (self._pieces if isinstance(node.args[1], slice) else self._spaces)[node] = chosen
            return True
        if source not in self._spaces:
            return False
        spaces = self._of(source)
        if None in (channels := [space.channels for space in spaces]):
            return False
        if pieces := operators.parted(node, target, sum(channels)):
            self._pieces[node] = [self._cut(spaces, *piece) for piece in pieces]
            return True
        piece = operators.sliced(node, target, sum(channels))
        if piece is None:
            return False
        self._spaces[node] = spaces if piece == (0, sum(channels)) else self._cut(spaces, *piece)
        return True

    def _cut(self, spaces: Spaces, first: int, end: int) -> Spaces:
        """The channels from `first` to before `end` of a tensor: whole spaces, or a new one whose order must stay.

        The numbers stand in the network's code: no channel may be removed before them.
        """
        taken, start = [], 0
        for space in spaces:
            space.sized.add("a split")
            stop = start + space.channels
            if first <= start and stop <= end:
                taken.append(space)
            elif start < end and first < stop:
                self._fix((space,), "a split")
                taken.append(Space(min(stop, end) - max(start, first), fixed={"a split"}))
            start = stop
        return tuple(taken)

    def _fix_tensors_in_two_places(self) -> None:
        """Another order of a tensor that two modules share, or that is read beside its module, would be wrong there."""
        owners: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append(name)
        shared = {name for names in owners.values() if len(names) > 1 for name in names}
        shared |= {node.target.rpartition(".")[0] for node in self.nodes if node.op == "get_attr"}
        tensors = [*self._spaces.values(), *self.input.values()]
        for space in {self._find(space) for spaces in tensors for space in spaces}:
            if not shared.isdisjoint([*space.producers, *space.carriers, *space.consumers]):
                space.fixed.add("shared weights")

    def _of(self, node: torch.fx.Node) -> Spaces:
        """Those of the node's tensor. What was made from numbers alone has one that nobody else has."""
        return self._found(self._spaces.setdefault(node, (Space(fixed={"a tensor made of numbers"}),)))

    def _found(self, spaces: Spaces) -> Spaces:
        return tuple(self._find(space) for space in spaces)

    def _find(self, space: Space) -> Space:
        while space in self._merged:
            space = self._merged[space]
        return space

    def _fix(self, spaces: Spaces, reason: str) -> None:
        for space in spaces:
            self._find(space).fixed.add(reason)

    def _tie(self, a: Spaces, b: Spaces) -> Spaces:
        """The spaces of two tensors whose channels are added or multiplied, united one by one."""
        if len(a) == len(b) == 1 or [space.channels for space in a] == [space.channels for space in b]:
            return tuple(self._union(self._find(x), self._find(y)) for x, y in zip(a, b, strict=True))
        # Parts that begin elsewhere, or a tensor of one channel or without channels.
        self._fix((*a, *b), "a sum or product of other parts")
        return max(a, b, key=len)

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
            if isinstance(target, POOL_MODULES) or (is_in(target, POOL_CALLS) and carries(node, target, 1)):
                continue
            if node.op == "call_module" and node.target in self.layers:
                head.add(node.target)
            queue.extend(node.all_input_nodes)
        if head >= self.masked_layers().keys():  # there is no pooling to stand behind, as in segmentation
            return {name for name in head if LOGITS in self.output[name].fixed} or head
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
