"""Magnitude pruning at once or in rounds: iterative magnitude pruning (IMP) with rewinding.

Han et al., "Learning both Weights and Connections" (NeurIPS 2015); rewinding: Frankle & Carbin, "The Lottery Ticket
Hypothesis" (ICLR 2019).
"""

import torch
from torch import Tensor, nn

from pruning.layers import add_mask, hold, masked_layers
from pruning.options import IMPOptions
from pruning.score import Calibration
from pruning.selection import Selective
from structure import Graph
from utils.kept import Kept
from utils.run import Run


class IMP(Selective):
    """From trained weights, every round prunes the same share of what is left by magnitude, and trains.

    One round is one-shot magnitude pruning and fine-tuning, or, with a checkpoint's scores, fine-tuning under the masks
    that they give. Dead filters are silenced: their batch-norm has no scale and no shift.

    The learning rate's schedule starts anew with each round. With `rewind`, later rounds start from the weights that
    the run started from, under the new mask, and not from those that the round before has trained.
    """

    options: IMPOptions

    @property
    def rounds(self) -> int:
        return self.options.rounds

    def __str__(self) -> str:
        rewind = "" if self.options.rewind else " without rewinding"
        return super().__str__() + (f", {self.rounds} rounds{rewind}" if self.rounds > 1 else "")

    def attach(self, network: nn.Module, calibration: Calibration | None = None) -> None:
        self.check(network)
        layers = self.layers(network)
        if self.rounds > 1 and self.options.rewind:
            network.rewind_to = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        if self.options.layer_type == "filter" and not self.published:
            for name, norms in norms_of_filters(network, layers).items():
                layers[name].silenced = norms
        scores = self.start_scores(layers) or {name: layer.weight for name, layer in layers.items()}
        masks = self.masks(scores, self.options.k ** (1 / self.rounds))
        for name, layer in layers.items():
            add_mask(layer, masks[name])
        self.settle(network)

    def step(self, run: Run, *batches: tuple[Tensor, Tensor]) -> None:
        epochs = run.epochs // self.rounds
        begins = run.loader.batch == run.batches_per_step and run.epoch % epochs == 0
        if begins and run.epoch:
            self.begin_round(run, run.epoch // epochs)
        super().step(run, *batches)

    @torch.no_grad()
    def begin_round(self, run: Run, number: int) -> None:
        """Prune by the weights that the last round has trained. `number` counts from 0."""
        layers = masked_layers(run.network)
        scores = {name: layer.weight for name, layer in layers.items()}
        masks = self.masks(scores, self.options.k ** ((number + 1) / self.rounds))
        if self.options.rewind:
            run.network.load_state_dict(run.network.rewind_to, strict=False)
            for optimizer in run.optimizers:
                optimizer.state.clear()
        for name, layer in layers.items():
            layer.mask.copy_(masks[name])
        self.settle(run.network)
        if self.options.rewind and run.average:
            run.average.restart(run.iteration - 1)  # the update of the step at hand is still to come

    def after_update(self, run: Run) -> None:
        self.settle(run.network)

    @torch.no_grad()
    def settle(self, network: nn.Module) -> None:
        layers = masked_layers(network).values()
        hold(list(layers))
        for layer in layers:
            for norm in map(network.get_submodule, getattr(layer, "silenced", ())):
                alive = layer.mask.flatten(1).any(1)
                norm.weight.mul_(alive)
                norm.bias.mul_(alive)

    def finish(self, network: nn.Module) -> dict[str, Kept]:
        for module in network.modules():
            for plan in ("rewind_to", "silenced"):
                vars(module).pop(plan, None)
        return super().finish(network)


def norms_of_filters(network: nn.Module, layers: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Of `layers`, those whose outputs batch-norms see that see no others -> their names."""
    graph = Graph(network)
    lone = {name: graph.output[name] for name in layers if graph.output[name].producers == [name]}
    return {name: graph.norms_of(space) for name, space in lone.items()}
