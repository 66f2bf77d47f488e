"""BiP: masks and weights as two levels of one problem, each step solved by first-order updates of both.

Zhang et al., "Advancing Model Pruning via Bi-level Optimization" (NeurIPS 2022). With z = m * theta, the lower level is
theta*(m) = argmin l(m * theta) + gamma / 2 |theta|^2, and the upper one min l(m * theta*(m)). Since the lower gradient
vanishes at theta*, its derivative (Hessian left out) is d theta*/dm = -(1 / gamma) diag(grad_z l), so that

    dl/dm = theta * grad_z - (1 / gamma) * m * grad_z^2.
"""

import math

import torch
from torch import nn

from pruning.hydra import Hydra
from pruning.layers import masked_layers
from pruning.options import BiPOptions
from pruning.published import BIP_DECAYS

# The scores' schedule, epoch by epoch: from the share of the training that is done, the share of the peak rate.
POLICIES = {
    "cos": lambda progress, decays: 0.5 + 0.5 * math.cos(math.pi * progress),
    "step": lambda progress, decays: 0.1 ** sum(progress >= decay for decay in decays),
}


class BiP(Hydra):
    """Every step draws two batches: on one the weights learn under the mask, on the other the scores.

    The implicit term needs no third pass: m is 0 or 1, so m * grad_z^2 is the square of the weight's own gradient.

    As published (`fidelity` "reference"): scores share their memory with weights; both optimisers hold all parameters,
    so that decay and momentum of either act on both; the implicit term squares the scores' gradient instead, and that
    of batch-norm, too; the rate of the scores starts from `lr`.
    """

    batches_per_step = 2

    options: BiPOptions

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
        if self.options.accelerate:
            self.upper(run, first, 0.0)
            self.lower(run, second)
        else:
            self.lower(run, first)
            self.upper(run, second, self.options.lr2)
        self.after_update(run)

    def lower(self, run, batches) -> None:
        """The weights learn under the mask."""
        self._gradients(run, batches)
        if self.published:
            torch._foreach_zero_([layer.popup_scores.grad for layer in masked_layers(run.network).values()])
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
        peak = self.options.lr if self.published else self.options.mask_lr
        return peak * POLICIES[self.options.mask_lr_policy](progress, BIP_DECAYS[self.options.fidelity])

    def _gradients(self, run, batches) -> None:
        for images, labels in batches:
            run.backward(run.forward(images, labels) / len(batches))


@torch.no_grad()
def add_implicit_term(layers: list[nn.Module], lr2: float) -> None:
    """Let the gradient of scores know that weights will follow the mask: -lr2 * m * grad_z^2, by the sign of scores."""
    if not lr2:
        return
    squares = torch._foreach_mul([layer.weight.grad for layer in layers], [layer.weight.grad for layer in layers])
    torch._foreach_mul_(squares, torch._foreach_sign([layer.popup_scores for layer in layers]))
    torch._foreach_add_([layer.popup_scores.grad for layer in layers], squares, alpha=-lr2)
