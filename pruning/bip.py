"""BiP: masks and weights as two levels of one problem, each step solved by first-order updates of both.

Zhang et al., "Advancing Model Pruning via Bi-level Optimization" (NeurIPS 2022). With z = m * theta, the lower level is
theta*(m) = argmin l(m * theta) + gamma / 2 |theta|^2, and the upper one min l(m * theta*(m)). Since the lower gradient
vanishes at theta*, its derivative (Hessian left out) is d theta*/dm = -(1 / gamma) diag(grad_z l), so that

    dl/dm = theta * grad_z - (1 / gamma) * m * grad_z^2.
"""

import math

import torch
from torch import Tensor, nn

from pruning.hydra import Hydra
from pruning.layers import masked_layers
from pruning.method import Method
from pruning.options import BiPOptions
from utils.published import BIP_DECAYS
from utils.run import Run

# The scores' schedule, epoch by epoch: from the share of the training that is done, the share of the peak rate.
POLICIES = {
    "cos": lambda progress, decays: 0.5 + 0.5 * math.cos(math.pi * progress),
    "step": lambda progress, decays: 0.1 ** sum(progress >= decay for decay in decays),
}


class BiP(Hydra):
    """Every step draws two batches: on one the weights learn under the mask, on the other the scores.

    The implicit term needs no third pass: m is 0 or 1, so m * grad_z^2 is the square of the weight's own gradient.
    """

    batches_per_step = 2

    options: BiPOptions

    @classmethod
    def create(cls, name: str, options: BiPOptions) -> Method:
        if options.fidelity == "reference" and cls is not PublishedBiP:
            return PublishedBiP.create(name, options)
        return super().create(name, options)

    def freeze(self, layer: nn.Module) -> None:
        """Everything learns, each in its turn."""

    def optimizers(self, network: nn.Module, make) -> list[torch.optim.Optimizer]:
        return list(map(make, weights_and_scores(network)))

    def step(self, run: Run, *batches: tuple[Tensor, Tensor]) -> None:
        first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
        if self.options.accelerate:
            self.upper(run, first, 0.0)
            self.lower(run, second)
        else:
            self.lower(run, first)
            self.upper(run, second, self.options.lr2)
        self.after_update(run)

    def lower(self, run: Run, batches) -> None:
        """The weights learn under the mask."""
        self._gradients(run, batches)
        run.update(run.optimizers[0])

    def upper(self, run: Run, batches, lr2: float) -> None:
        """The scores learn."""
        self._gradients(run, batches)
        add_implicit_term(list(masked_layers(run.network).values()), lr2)
        self._update_scores(run)

    def mask_rate(self, progress: float) -> float:
        """The learning rate of the scores after the share `progress` of the training, 0 to 1."""
        return self._rate(progress, self.options.mask_lr)

    def _rate(self, progress: float, peak: float) -> float:
        return peak * POLICIES[self.options.mask_lr_policy](progress, BIP_DECAYS[self.options.fidelity])

    def _update_scores(self, run: Run) -> None:
        rate = self.mask_rate(run.epoch / run.epochs)
        for group in run.optimizers[1].param_groups:
            group["lr"] = rate
        run.update(run.optimizers[1])

    def _gradients(self, run: Run, batches) -> None:
        for images, labels in batches:
            run.backward(run.forward(images, labels) / len(batches))


class PublishedBiP(BiP):
    """BiP as its published code computes it (`--fidelity reference`), which differs from the paper:

    - Scores share their memory with the weights (`Hydra.attach`), so that either moves with the other.
    - Both optimisers hold all parameters. A parameter that is frozen at one level has a gradient of zeros there, so
      decay and momentum of that level's optimiser still move it. It has none, and stays, until it has learned once.
    - Batch norms learn at both levels. The implicit term squares the gradients of scores and of batch norms.
    - Masks are chosen anew in every forward pass, so also between the two levels.
    - Without `accelerate` a step passes its second batch through the network three times, of which the last pass, under
      the new masks, is for the log. Each pass moves the running statistics of batch norms.
    - The rate of the scores starts from `lr`, not from `mask_lr`.
    """

    def optimizers(self, network: nn.Module, make) -> list[torch.optim.Optimizer]:
        # In groups of their own: tensors that share memory must not be updated at once.
        groups = weights_and_scores(network)
        return [make([{"params": group} for group in groups]) for _ in range(2)]

    def step(self, run: Run, *batches: tuple[Tensor, Tensor]) -> None:
        first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
        if self.options.accelerate:
            self.upper(run, first, 0.0)
            self.settle(run.network)
            self.lower(run, second)
            self.settle(run.network)
        else:
            self.lower(run, first)
            self.settle(run.network)
            self._pass(run, second)
            self.upper(run, second, self.options.lr2)
            self.settle(run.network)
            self._pass(run, second)

    def lower(self, run: Run, batches) -> None:
        self._gradients(run, batches)
        _, scores = weights_and_scores(run.network)
        _freeze(scores, learned=run.iteration > 1 or self.options.accelerate)
        run.update(run.optimizers[0])

    def upper(self, run: Run, batches, lr2: float) -> None:
        self._gradients(run, batches)
        weights, scores = weights_and_scores(run.network)
        norms = [module for module in run.network.modules() if isinstance(module, nn.BatchNorm2d)]
        of_norms = [parameter for norm in norms for parameter in norm.parameters()]
        learning = {*map(id, of_norms)}
        frozen = [parameter for parameter in weights if id(parameter) not in learning]
        _freeze(frozen, learned=run.iteration > 1 or not self.options.accelerate)
        gradients = [parameter.grad for parameter in (*of_norms, *scores) if parameter.grad is not None]
        torch._foreach_addcmul_(gradients, gradients, gradients, value=-lr2)
        self._update_scores(run)

    def mask_rate(self, progress: float) -> float:
        return self._rate(progress, self.options.lr)

    @torch.no_grad()
    def _pass(self, run: Run, batches) -> None:
        """Only the statistics of batch norms move."""
        for images, _ in batches:
            run.network(images)


def weights_and_scores(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All parameters of `network`: those that are no scores, and the scores."""
    scores = [layer.popup_scores for layer in masked_layers(network).values()]
    numbers = set(map(id, scores))
    return [parameter for parameter in network.parameters() if id(parameter) not in numbers], scores


def _freeze(parameters: list[nn.Parameter], learned: bool) -> None:
    """Take the gradients of parameters that are frozen at this level of the published step.

    Where they have learned before, zeros are left, as `zero_grad` of torch 1 left them: the optimiser's decay and
    momentum still move the parameters. Where they have not, there is no gradient, and they stay.
    """
    if learned:
        torch._foreach_zero_([parameter.grad for parameter in parameters if parameter.grad is not None])
        return
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def add_implicit_term(layers: list[nn.Module], lr2: float) -> None:
    """Let the gradient of scores know that weights will follow the mask: -lr2 * m * grad_z^2, by the sign of scores."""
    if not lr2:
        return
    squares = torch._foreach_mul([layer.weight.grad for layer in layers], [layer.weight.grad for layer in layers])
    torch._foreach_mul_(squares, torch._foreach_sign([layer.popup_scores for layer in layers]))
    torch._foreach_add_([layer.popup_scores.grad for layer in layers], squares, alpha=-lr2)
