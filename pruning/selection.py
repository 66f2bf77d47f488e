"""Which weights stay: the share `k` with the highest scores, alone, by filter, by input channel or by 1xN block.

What scores are (learned, or the weights themselves) and when they are asked is the business of `bip`, `hydra`, `imp`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.formats.bip import UNUSED
from pruning.budget import cut
from pruning.groups import BLOCKS, CHANNELS, FILTERS, WEIGHTS, Pattern, group_means, spread
from pruning.layers import check_plain, masked_layers, remove_mask
from pruning.method import Method
from pruning.options import SelectiveOptions
from structure import Graph
from utils.kept import Kept


@dataclass(frozen=True)
class Unit:
    """What `--layer_type` means."""

    pattern: Pattern
    budget: str  # as published: one ranking over all layers, or the same share of each
    exempt: frozenset[str] = frozenset()  # layers left dense
    convolutions_only: bool = False


UNITS = {
    "unstructured": Unit(WEIGHTS, "global"),
    "filter": Unit(FILTERS, "uniform", frozenset({"head"}), True),
    "channel": Unit(CHANNELS, "uniform", frozenset({"head", "stem"}), True),
    "block": Unit(BLOCKS, "uniform", frozenset({"head", "stem"})),
}


@torch.no_grad()
def select(scores: dict[str, Tensor], pattern: Pattern, k: float, everywhere: bool) -> dict[str, Tensor]:
    """The bool mask of every layer, of its scores' shape: the share `k` of groups with the highest scores is kept.

    A group's score is |s| of a single weight, the mean square of several. Groups go in the published number,
    `int((1 - k) * n)` in double precision, of each layer's n groups, or of all groups together if `everywhere`; then a
    layer of wider groups keeps one at least.
    """
    means = [group_means(s.square() if pattern.dims else s.abs(), pattern) for s in scores.values()]
    if everywhere:
        goes = cut(means, int((1 - k) * sum(map(len, means))), least=1 if pattern.dims else 0)
    else:
        goes = [cut([mean], int((1 - k) * len(mean)))[0] for mean in means]
    return {name: spread(~gone, pattern, s) for (name, s), gone in zip(scores.items(), goes, strict=True)}


class Selective(Method):
    """What methods that keep the highest scores have in common."""

    options: SelectiveOptions

    def __init__(self, name: str, options: SelectiveOptions):
        super().__init__(name, options)
        self.given: dict[str, Tensor] = {}  # scores of a checkpoint, by layer, until they are attached
        self.unit = UNITS[options.layer_type]
        self.pattern = self.unit.pattern.of(options.length)
        self.published = options.fidelity == "reference"

    def __str__(self) -> str:
        budget = f", {self.options.budget}" if self.options.budget else ""
        published = ", as the published code" if self.published else ""
        return f"{type(self).__name__}, {self.pattern}, k {self.options.k:g}{budget}{published}"

    def layers(self, network: nn.Module) -> dict[str, nn.Module]:
        """The layers to prune. The published code prunes the stem, too, where weights are no single ones."""
        graph = Graph(network)
        exempt = set(self.unit.exempt) - ({"stem"} if self.published else set())
        left_out = set()
        left_out |= graph.head if "head" in exempt else set()
        left_out |= graph.stem if "stem" in exempt else set()
        kinds = nn.Conv2d if self.unit.convolutions_only else nn.Module
        layers = {name: layer for name, layer in graph.layers.items() if name in graph.output}
        return {name: layer for name, layer in layers.items() if name not in left_out and isinstance(layer, kinds)}

    def check(self, network: nn.Module) -> None:
        layers = self.layers(network)
        if not layers:
            raise ValueError(f"{type(network).__name__} has no layer to prune outside of its stem and classifier")
        check_plain(layers)
        if max(len(layer.weight) for layer in layers.values()) < self.options.length:
            raise ValueError(f"--N {self.options.length}: longer than the widest layer of this network")

    def accept(self, tensors: dict[str, Tensor]) -> None:
        scores = {name.removesuffix(".popup_scores"): tensor for name, tensor in tensors.items()}
        foreign = [name for name in scores if name in tensors]
        if foreign:
            super().accept({name: tensors[name] for name in foreign})
        self.given = scores

    def start_scores(self, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        """The checkpoint's scores on their layers' device, or nothing.

        Those of a linear layer fit a 1x1 convolution, as its weight does. After them stand those of layers that are not
        there, which only take part in a ranking over all (`UNUSED`).

        Raises:
            ValueError: they are not those of `layers`.
        """
        if not self.given:
            return {}
        unused = {n: scores for n, scores in self.given.items() if n.startswith(UNUSED) and n not in layers}
        own = {name: scores for name, scores in self.given.items() if name not in unused}
        shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        for name in own.keys() & shapes.keys():
            if (*own[name].shape, 1, 1) == shapes[name]:
                own[name] = own[name][..., None, None]
        given = {name: tuple(scores.shape) for name, scores in own.items()}
        if shapes != given:
            odd = min(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
            raise ValueError(
                f"--layer_type {self.options.layer_type}, --fidelity {self.options.fidelity}: the checkpoint's scores "
                f"of {odd} are {given.get(odd, 'missing')}, its weights to prune {shapes.get(odd, 'none')}"
            )
        like = next(iter(layers.values())).weight
        return {name: own[name].to(layer.weight) for name, layer in layers.items()} | {
            name: scores.to(like) for name, scores in unused.items()
        }

    def masks(self, scores: dict[str, Tensor], k: float) -> dict[str, Tensor]:
        """The bool mask of every layer under its scores (O, I, ...), of which the share `k` is kept."""
        everywhere = (self.options.budget or self.unit.budget) == "global"
        return select({name: s.detach() for name, s in scores.items()}, self.pattern, k, everywhere)

    def finish(self, network: nn.Module) -> dict[str, Kept]:
        kept = {}
        for name, layer in masked_layers(network).items():
            sparsity = 1 - float(layer.mask.double().mean())
            kept[name] = Kept(str(self.pattern), 1 - self.options.k, sparsity, self.pattern.N)
            remove_mask(layer)
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return kept
