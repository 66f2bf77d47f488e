"""Two networks of one structure, computed side by side, one node of their graph after the other.

After each node the second network may be changed, and what follows sees the change: layers are repaired in one pass.
"""

import operator
from collections.abc import Iterator

import torch
import torch.fx
from torch import Tensor, nn

from structure.capture import evaluating
from structure.graph import Graph
from structure.operators import SUM_CALLS

DENSE, CHANGED = 0, 1
IN_PLACE_CALLS = {operator.iadd, operator.imul, operator.isub, operator.itruediv}


class Walk:
    """What the nodes of `dense` and `network` compute from the same pictures, as long as a later node reads it.

    Iterating yields every node in the order of computation, at the moment when `dense` has computed it and `network`
    is about to: the module of `network` at that node may be changed then. Both networks run in eval mode and without
    gradients. Where nothing before a node differs, both share one value, equal bit by bit.

    Args:
        network: the one that is changed; it has the modules of `dense` under the same names.
        batches: images (B, 3, H, W), on the networks' device.
        dtype: in which values are kept between two nodes. They are computed in float32.

    Raises:
        ValueError: the network cannot be traced.
    """

    def __init__(self, dense: nn.Module, network: nn.Module, batches: list[Tensor], dtype: torch.dtype = torch.float32):
        self.networks, self.graph = (dense, network), Graph(network)
        self.batches, self.dtype = batches, dtype
        self._modules = tuple(dict(network.named_modules()) for network in self.networks)
        self._values: tuple[dict, dict] = ({}, {})
        self._last = {source: node for node in self.graph.nodes for source in node.all_input_nodes}

    def __iter__(self) -> Iterator[torch.fx.Node]:
        for node in self.graph.nodes:
            if node.op == "output":
                break
            with torch.no_grad(), evaluating(self.networks[DENSE]), evaluating(self.networks[CHANGED]):
                self._compute(node, DENSE)
                yield node
                differ = self.inputs_differ(node)
                self._forget(node, DENSE)  # before the other network computes: a quarter of the memory at most
                if differ or self._module_differs(node):
                    self._compute(node, CHANGED)
                if not differ and self._same(node):
                    self._values[CHANGED][node] = self._values[DENSE][node]
                if self._in_place(node):  # who reads its first input later on reads what has become of it
                    for values in self._values:
                        values[node.args[0]] = values[node]
                for which in (DENSE, CHANGED):
                    self._forget(node, which)

    def module(self, node: torch.fx.Node, which: int = CHANGED) -> nn.Module | None:
        """The module that the node calls, if it calls one."""
        return self._modules[which][node.target] if node.op == "call_module" else None

    def values(self, node: torch.fx.Node, which: int) -> Iterator[Tensor]:
        """What the node computes in one of the networks, one batch after the other."""
        return (self._load(value) for value in self._values[which][node])

    def known(self, node: torch.fx.Node) -> bool:
        """Whether both networks have computed the node, and its value is still kept."""
        return node in self._values[CHANGED]

    def inputs_differ(self, node: torch.fx.Node) -> bool:
        """Whether the networks differ in what the node reads."""
        mine, theirs = self._values
        return any(mine[source] is not theirs[source] for source in node.all_input_nodes)

    def norm_after(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """The batch norm that alone reads the node, if there is one."""
        (user, *others) = node.users or (None,)
        return user if not others and user and isinstance(self.module(user), nn.BatchNorm2d) else None

    def shortcut(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """What is added to the node's value, and to nothing before; None unless both networks know it already."""
        (total, *others) = node.users or (None,)
        if others or total is None or total.op == "call_module" or total.target not in SUM_CALLS:
            return None
        added = [source for source in total.all_input_nodes if source is not node]
        return added[0] if len(added) == 1 and self.known(added[0]) else None

    def _module_differs(self, node: torch.fx.Node) -> bool:
        """Whether the node's modules may compute something else: their tensors differ, or the names of these."""
        if node.op != "call_module":
            return False
        mine, theirs = (self.module(node, which).state_dict() for which in (DENSE, CHANGED))
        return mine.keys() != theirs.keys() or any(not torch.equal(mine[name], theirs[name]) for name in mine)

    def _same(self, node: torch.fx.Node) -> bool:
        if node not in self._values[CHANGED]:
            return True
        pairs = zip(*(values[node] for values in self._values), strict=True)
        return all(torch.equal(mine, theirs) for mine, theirs in pairs if isinstance(mine, Tensor))

    def _compute(self, node: torch.fx.Node, which: int) -> None:
        self._values[which][node] = [
            self._store(self._call(node, which, number, images)) for number, images in enumerate(self.batches)
        ]

    def _call(self, node: torch.fx.Node, which: int, number: int, images: Tensor) -> object:
        if node.op == "placeholder":
            return images
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.networks[which])
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda source: self._load(self._values[which][source][number])
        )
        if self._in_place(node):
            args = (args[0].clone(), *args[1:])
        call = self.module(node, which) or node.target
        return getattr(args[0], call)(*args[1:], **kwargs) if isinstance(call, str) else call(*args, **kwargs)

    def _in_place(self, node: torch.fx.Node) -> bool:
        if node.op == "call_module":
            return getattr(self.module(node), "inplace", False)
        named = isinstance(node.target, str) and node.op == "call_method" and node.target.endswith("_")
        return named or node.target in IN_PLACE_CALLS or bool(node.kwargs.get("inplace"))

    def _store(self, value: object) -> object:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _load(self, value: object) -> object:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def _forget(self, node: torch.fx.Node, which: int) -> None:
        for source in node.all_input_nodes:
            if self._last[source] is node:
                self._values[which].pop(source, None)
