"""BiP: masks and weights as two levels of one problem, each step solved by first-order updates of both.

Zhang et al., "Advancing Model Pruning via Bi-level Optimization" (NeurIPS 2022). With z = m * theta, the lower level is
theta*(m) = argmin l(m * theta) + gamma / 2 |theta|^2, and the upper one min l(m * theta*(m)). Since the lower gradient
vanishes at theta*, its derivative (Hessian left out) is d theta*/dm = -(1 / gamma) diag(grad_z l), so that

    dl/dm = theta * grad_z - (1 / gamma) * m * grad_z^2.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from pruning.hydra import Hydra
from pruning.layers import masked_layers

# Share of the peak rate of the scores -> after this share of the training it is a tenth, a hundredth.
DECAYS = {"paper": (0.75, 0.9), "reference": (0.5, 0.75)}
POLICIES = {
    "cos": lambda progress, decays: 0.5 + 0.5 * math.cos(math.pi * progress),
    "step": lambda progress, decays: 0.1 ** sum(progress >= decay for decay in decays),
}


@dataclass
class BiP(Hydra):
    """Every step draws two batches: on one the weights learn under the mask, on the other the scores.

    The implicit term needs no third pass: m is 0 or 1, so m * grad_z^2 is the square of the weight's own gradient.

    Args:
        lr2: 1 / gamma, the weight of the implicit term.
        mask_lr: peak learning rate of the scores; `lr` is that of the weights.
        mask_lr_policy: its schedule, epoch by epoch, a key of `POLICIES`.
        accelerate: scores first, without the implicit term, then weights.

    As published (`fidelity` "reference"): scores share their memory with weights; both optimisers hold all parameters,
    so that decay and momentum of either act on both; the implicit term squares the scores' gradient instead, and that
    of batch-norm, too; the rate of the scores starts from `lr`.
    """

    batches_per_step = 2

    lr2: float = 1e-4
    lr: float = 0.01
    mask_lr: float = 0.1
    mask_lr_policy: str = "cos"
    accelerate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_lr_policy not in POLICIES:
            raise ValueError(f"--mask_lr_policy {self.mask_lr_policy}: one of {', '.join(POLICIES)}")
        for name in ("lr2", "mask_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be 0 or more")

    def freeze(self, layer: nn.Module) -> None:
        """Everything learns, each in its turn."""

    def optimizers(self, network: nn.Module, make) -> list[torch.optim.Optimizer]:
        scores = [layer.popup_scores for layer in masked_layers(network).values()]
        numbers = set(map(id, scores))
        others = [parameter for parameter in network.parameters() if id(parameter) not in numbers]
        if self.published:  # in groups of their own: tensors that share memory must not be updated at once
            return [make([{"params": others}, {"params": scores}]) for _ in range(2)]
        return [make(others), make(scores)]

    def step(self, run, *batches) -> None:
        first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
        if self.accelerate:
            self.upper(run, first, 0.0)
            self.lower(run, second)
        else:
            self.lower(run, first)
            self.upper(run, second, self.lr2)
        self.after_update(run)

    def lower(self, run, batches) -> None:
        """The weights learn under the mask."""
        self._gradients(run, batches)
        if self.published:
            for layer in masked_layers(run.network).values():
                layer.popup_scores.grad.zero_()
        run.update(run.optimizers[0])

    def upper(self, run, batches, lr2: float) -> None:
        """The scores learn."""
        self._gradients(run, batches)
        layers = list(masked_layers(run.network).values())
        if self.published:
            for layer in layers:
                for parameter in (layer.weight, layer.bias):
                    if parameter is not None:
                        parameter.grad.zero_()
            for parameter in run.network.parameters():
                parameter.grad.addcmul_(parameter.grad, parameter.grad, value=-lr2)
        else:
            add_implicit_term(layers, lr2)
        rate = self.mask_rate(run.epoch / run.epochs)
        for group in run.optimizers[1].param_groups:
            group["lr"] = rate
        run.update(run.optimizers[1])

    def mask_rate(self, progress: float) -> float:
        peak = self.lr if self.published else self.mask_lr
        return peak * POLICIES[self.mask_lr_policy](progress, DECAYS[self.fidelity])

    def _gradients(self, run, batches) -> None:
        for images, labels in batches:
            run.backward(run.forward(images, labels) / len(batches))


@torch.no_grad()
def add_implicit_term(layers: list[nn.Module], lr2: float) -> None:
    """Let the gradient of scores know that weights will follow the mask: -lr2 * m * grad_z^2, by the sign of scores."""
    for layer in layers:
        response = layer.weight.grad.square().mul_(layer.popup_scores.sign())
        layer.popup_scores.grad.sub_(response, alpha=lr2)
