"""How important a weight is: one number for each, which groups then average.

The table needs no torch until a score is computed, since the command line reads its names.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

# From a weight and what else is known of it, of its shape: for `taylor` the root mean square of its gradient over
# batches, for `obs` the price of its group; None for the others.
SCORES: dict[str, Callable[["Tensor", "Tensor | None"], "Tensor"]] = {
    "l1": lambda weight, gradient: weight.abs(),
    "l2": lambda weight, gradient: weight.square(),
    # Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019): the loss changes by
    # gradient * weight, to first order, if the weight becomes zero.
    "taylor": lambda weight, gradient: (weight * gradient).abs(),
    # Optimal Brain Surgeon: what the layer's outputs lose if the group goes and the others make up for it. A repair
    # computes these prices, one layer after the other (`repair`).
    "obs": lambda weight, price: price,
}
NEED_GRADIENTS = {"taylor"}


class Calibration(NamedTuple):
    """Pictures that a method may look at before training.

    Attributes:
        batches: a call gives (images (B, 3, H, W), labels (B,)) batches on the network's device, the same every time.
        loss: (logits (B, classes), labels (B,)) -> the mean loss of a batch.
    """

    batches: Callable[[], Iterable[tuple["Tensor", "Tensor"]]]
    loss: Callable[["Tensor", "Tensor"], "Tensor"]


def score(weight: "Tensor", known: "Tensor | None" = None, kind: str = "l1") -> "Tensor":
    """The importance of every weight, in float64, since sums over groups must not depend on their order.

    Args:
        weight: (O, I, ...).
        known: of its shape, for the scores that need more than the weight.
        kind: a key of `SCORES`.
    """
    return SCORES[kind](weight.detach(), known).double()


def mean_gradients(
    network: "nn.Module", layers: dict[str, "nn.Module"], calibration: Calibration
) -> dict[str, "Tensor"]:
    """Root mean square over the calibration batches of each layer's weight gradient; the network stays as it was."""
    import torch

    from structure import evaluating

    weights, squares, count = [layer.weight for layer in layers.values()], None, 0
    with evaluating(network):  # batch statistics must not move
        for images, labels in calibration.batches():
            loss = calibration.loss(network(images), labels)
            gradients = torch.autograd.grad(loss, weights)
            new = torch._foreach_mul(gradients, gradients)
            squares = new if squares is None else torch._foreach_add(squares, new)
            count += 1
    if not count:
        raise ValueError("--score taylor: there is no calibration picture")
    return dict(zip(layers, torch._foreach_sqrt(torch._foreach_div(squares, count)), strict=True))
