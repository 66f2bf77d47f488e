"""One-shot magnitude and random pruning: the 1xN family and its baselines, as rows of one table.

1xN blocks: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks" (TPAMI 2022).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning import patterns
from pruning.graph import Graph
from pruning.layers import add_mask, hold, masked_layers, remove_mask
from pruning.method import Method

BLOCKS = ("aligned", "reference")


@dataclass(frozen=True)
class Row:
    """One one-shot method: which weights share a fate, and whether chance or magnitude decides."""

    groups: Callable[[patterns.Shape, int, str], Tensor]  # (shape, N, blocks) -> group numbers
    label: str
    random: bool = False
    in_blocks: bool = False  # consecutive filters share a fate, so that rearranging them means something


def _kernels(shape: patterns.Shape, N: int, blocks: str) -> Tensor:
    return patterns.block_groups(shape, 1, blocks)  # a kernel is a block of one


ROWS = {
    "block_l1": Row(patterns.block_groups, "1x{N} blocks", in_blocks=True),
    "block_random": Row(patterns.block_groups, "random 1x{N} blocks", random=True, in_blocks=True),
    "weight": Row(lambda shape, N, blocks: patterns.weight_groups(shape), "weights"),
    "filter": Row(lambda shape, N, blocks: patterns.filter_groups(shape), "filters"),
    "kernel_l1": Row(_kernels, "kernels"),
    "kernel_random": Row(_kernels, "random kernels", random=True),
}


@dataclass
class OneShot(Method):
    """Masks fixed at `attach`, then fine-tuning.

    Args:
        row: which method, a key of `ROWS`.
        N: block length.
        pr_target: share of groups to prune in every layer, in [0, 1).
        rearrange: form blocks among filters sorted by L1 norm.
        full: prune the classifier too.
        blocks: where N does not divide a layer's width, "aligned" ends a column with a shorter block and "reference"
            wraps around; "reference" also draws random blocks with replacement, as published.
        seed: of random masks.
    """

    row: str
    N: int = 16
    pr_target: float = 0.5
    rearrange: bool = False
    full: bool = False
    blocks: str = "aligned"
    seed: int = 0

    def __post_init__(self) -> None:
        self.kept: dict[str, dict] = {}
        if not 0 <= self.pr_target < 1:
            raise ValueError(f"--pr_target {self.pr_target}: a rate in [0, 1)")
        if self.N < 1:
            raise ValueError(f"--N {self.N}: a block length of 1 or more")
        if self.blocks not in BLOCKS:
            raise ValueError(f"--blocks {self.blocks}: one of {', '.join(BLOCKS)}")
        if self.rearrange and not ROWS[self.row].in_blocks:
            raise ValueError(f"--rearrange: means nothing for {self.row}, only for 1xN blocks")

    def check(self, network: nn.Module) -> None:
        layers = Graph(network).masked_layers()
        if not layers:
            raise ValueError(f"{type(network).__name__} has no layer to prune")
        if not self._in_blocks_of_several:
            return
        if max(layer.weight.shape[0] for layer in layers.values()) < self.N:
            raise ValueError(f"--N {self.N}: longer than the widest layer of this network")
        for name, layer in layers.items():
            O, I = layer.weight.shape[:2]
            if self.blocks == "reference" and O * I % self.N:
                raise ValueError(f"--N {self.N}: does not divide the {O * I} kernels of {name}; try --blocks aligned")

    def attach(self, network: nn.Module) -> None:
        self.check(network)
        graph = Graph(network)
        layers = graph.masked_layers()
        sorted_layers = rearranged_layers(graph) if self.rearrange else set()
        generator = torch.Generator().manual_seed(self.seed)
        for name, layer in layers.items():
            rate = self.pr_target if self.full or name not in graph.head else 0.0
            order = patterns.filter_order(layer.weight).cpu() if name in sorted_layers else None
            mask = self._mask(layer.weight.detach().cpu(), rate, order, generator)
            add_mask(layer, mask)
            self.kept[name] = {"pattern": ROWS[self.row].label.format(N=self.N), "rate": rate}
            if self._in_blocks_of_several:
                self.kept[name]["N"] = self.N
                if layer.weight.shape[0] % self.N:
                    self.kept[name]["note"] = _misfit_note(self.N, layer.weight.shape[0], self.blocks)

    def after_update(self, run) -> None:
        hold(list(masked_layers(run.network).values()))

    def finish(self, network: nn.Module) -> dict[str, dict]:
        for name, layer in masked_layers(network).items():
            self.kept[name]["sparsity"] = 1 - float(layer.mask.double().mean())
            remove_mask(layer)
        return self.kept

    @property
    def _in_blocks_of_several(self) -> bool:
        return ROWS[self.row].in_blocks and self.N > 1

    def _mask(self, weight: Tensor, rate: float, order: Tensor | None, generator: torch.Generator) -> Tensor:
        row, weight = ROWS[self.row], weight if weight.dim() == 4 else weight[:, :, None, None]
        groups = row.groups(tuple(weight.shape), self.N, self.blocks)
        if order is not None:
            groups = patterns.in_order(groups, order)
        if not row.random:
            return patterns.mask_without(groups, patterns.smallest(patterns.magnitude(weight, groups), rate))
        count = int(groups.max()) + 1
        if self.blocks == "reference":  # with replacement: 39 % where 50 % is asked
            return patterns.mask_without(groups, torch.randint(count, (int(count * rate),), generator=generator))
        return patterns.mask_without(groups, torch.randperm(count, generator=generator)[: int(count * rate)])


def _misfit_note(N: int, width: int, blocks: str) -> str:
    tail = f"blocks of {width % N} at the end" if blocks == "aligned" else "blocks wrap around"
    return f"{N} does not divide {width}: {tail}"


def rearranged_layers(graph: Graph) -> set[str]:
    """Names of the layers whose filters `--rearrange` sorts.

    The publication decides by layer names, for its own five networks. Elsewhere the structure decides: a layer is
    sorted if the order of its outputs is free to change, or else sorted filters could never become neighbours.
    """
    names = list(graph.masked_layers())
    for marker, published in PUBLISHED_REARRANGEMENT.items():
        if marker in names:
            return published(names)
    claimed, chosen = set(), set()
    for name in names:  # a space has one order: the first layer in it decides
        space = graph.output[name]
        if not space.fixed and space not in claimed:
            claimed.add(space)
            chosen.add(name)
    return chosen


def _every_second(names: list[str]) -> set[str]:
    """Plain, sorted, plain, ...: projections stay, expansions are sorted. Squeeze-excite layers do not count."""
    chosen, sort_next = set(), False
    for name in names:
        if sort_next:
            chosen.add(name)
        sort_next = not sort_next and "fc" not in name
    return chosen


# The layer that gives one of the published networks away -> its rule (the fact sheet calls them P and R).
PUBLISHED_REARRANGEMENT: dict[str, Callable[[list[str]], set[str]]] = {
    "features.0.3": set,  # MobileNet-V1: all
    "features.1.conv.3": _every_second,  # V2
    "features.1.conv.3.fc.0": _every_second,  # V3-small
    "features.1.conv.4": _every_second,  # V3-large
    "layer1.0.conv3": lambda names: {name for name in names if not name.endswith("conv3")},  # ResNet-50
}
