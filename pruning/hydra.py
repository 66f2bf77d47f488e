"""Hydra: which weights of a trained network stay is learned by gradient descent on a score beside each of them.

Sehwag et al., "HYDRA: Pruning Adversarially Robust Neural Networks" (NeurIPS 2020), for accuracy alone.
"""

import math
from dataclasses import fields

import torch
from torch import Tensor, nn

from pruning.imp import IMP
from pruning.layers import add_scores, masked_layers
from pruning.method import Method
from pruning.options import HydraOptions, IMPOptions
from pruning.repair import Repaired
from pruning.score import Calibration
from pruning.selection import Selective
from utils.kept import Kept
from utils.run import Run

# Scores to start with, from the weight (O, I, ...).
SCORE_INITS = {
    # The paper scales each layer by sqrt(6 / fan-in) / max |w| (equation 6). That is for a ranking within the layer; in
    # a ranking over all, it empties layers of many inputs.
    "magnitude": torch.clone,
    "random": lambda weight: nn.init.kaiming_uniform_(torch.empty_like(weight), a=math.sqrt(5)),
}


class Hydra(Selective):
    """Scores and batch-norm learn, weights are frozen. The selection is made once a step.

    A checkpoint's own scores come before those of `score_init`. Under random scores the weights grow by 1 / sqrt(k), as
    published. Under `fidelity` "reference", "magnitude" scores share their memory with the weights, so that either
    moves with the other.
    """

    options: HydraOptions

    @classmethod
    def create(cls, name: str, options: HydraOptions) -> Method:
        """The method of the phase `exp_mode`: before masks are learned training is dense, after it they are fixed."""
        if options.exp_mode == "pretrain":
            return Method("dense")
        if options.exp_mode == "finetune":
            shared = {field.name for field in fields(IMPOptions)} & {field.name for field in fields(options)}
            return IMP("imp", IMPOptions(**{option: getattr(options, option) for option in shared}))
        return cls(name, options)

    @torch.no_grad()
    def attach(self, network: nn.Module, calibration: Calibration | None = None) -> None:
        self.check(network)
        layers = self.layers(network)
        given = self.start_scores(layers)
        network.ranked_beside = {name: scores for name, scores in given.items() if name not in layers}
        for name, layer in layers.items():
            add_scores(layer, given.get(name, self._first_scores(layer.weight)))
            if not given and self.options.score_init == "random":
                layer.weight.div_(math.sqrt(self.options.k))
            self.freeze(layer)
        self.settle(network)

    def freeze(self, layer: nn.Module) -> None:
        """Stop what does not learn."""
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)

    def _first_scores(self, weight: Tensor) -> Tensor:
        if self.published and self.options.score_init == "magnitude":
            return weight.data
        return SCORE_INITS[self.options.score_init](weight.data)

    def calibrate(self, network: nn.Module, dense: nn.Module, calibration: Calibration) -> Repaired:
        layers = masked_layers(network).values()
        if any(layer.weight.data_ptr() == layer.popup_scores.data_ptr() for layer in layers):
            raise ValueError("--repair: under --fidelity reference the scores are the weights: --fidelity paper")
        return super().calibrate(network, dense, calibration)

    def after_update(self, run: Run) -> None:
        self.settle(run.network)

    @torch.no_grad()
    def settle(self, network: nn.Module) -> None:
        """Masks follow the scores."""
        layers = masked_layers(network)
        scores = {name: layer.popup_scores for name, layer in layers.items()} | network.ranked_beside
        masks = self.masks(scores, self.options.k)
        torch._foreach_copy_([layer.mask for layer in layers.values()], [masks[name] for name in layers])

    def finish(self, network: nn.Module) -> dict[str, Kept]:
        del network.ranked_beside
        return super().finish(network)
