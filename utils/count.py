"""Multiply-adds and parameters of convolutions and linear layers, all and kept."""

import math
from dataclasses import dataclass, replace


@dataclass
class Cost:
    """Of one convolution or linear layer, for one picture. A multiply-add counts as one; zeros are not kept.

    Where the layer is narrower than in the dense network, this is of the dense layer: what is gone counts as zeros.
    """

    shape: tuple[int, ...]  # of the weight
    macs: int
    parameters: int  # weight and bias
    weights: int
    zeros: int
    left: tuple[int, ...] = ()  # shape of the weight that is left, where that is smaller

    @property
    def density(self) -> float:
        return 1 - self.zeros / self.weights

    @property
    def macs_kept(self) -> int:
        return round(self.macs * self.density)


def count(network, image) -> dict[str, Cost]:
    """Costs of every convolution and linear layer that `image` (1, 3, H, W) passes through, in that order."""
    import torch  # here, so that reports can be drawn without it
    from torch import nn

    costs: dict[str, Cost] = {}

    def hook(name: str):
        def add(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            weight = layer.weight
            parameters = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
            zeros = weight.numel() - int(weight.count_nonzero())
            # An output value of a convolution costs one multiply-add a weight of its filter.
            macs = output[0].numel() * weight[0].numel()
            costs[name] = Cost(tuple(weight.shape), macs, parameters, weight.numel(), zeros)

        return add

    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    training = [module for module in network.modules() if module.training]
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            network.eval()(image)
    finally:
        for handle in hooks:
            handle.remove()
        for module in training:
            module.training = True
    return costs


def beside(dense: dict[str, Cost], costs: dict[str, Cost]) -> dict[str, Cost]:
    """The costs of a network that may have become narrower, or lost layers, as shares of those of the dense one."""

    def one(whole: Cost, own: Cost | None) -> Cost:
        if own is None:
            return replace(whole, zeros=whole.weights, left=(0, *whole.shape[1:]))
        left = own.shape if own.shape != whole.shape else ()
        return replace(whole, zeros=whole.weights - (own.weights - own.zeros), left=left)

    return {name: one(whole, costs.get(name)) for name, whole in dense.items()}


def totals(network, costs: dict[str, Cost], dense=None) -> dict[str, float]:
    """Sums over the network: multiply-adds and parameters, all and kept, and the share of weights that are zero.

    Parameters include those of batch-norm, which no layer's `Cost` counts. `costs` are those `beside` the network
    `dense`, if it is given.
    """

    def total(key: str) -> int:
        return sum(getattr(cost, key) for cost in costs.values())

    def parameters(of) -> int:
        return sum(parameter.numel() for parameter in of.parameters())

    whole = parameters(dense or network)
    gone = sum(cost.weights - math.prod(cost.left or cost.shape) for cost in costs.values())
    sums = {"macs": total("macs"), "macs_kept": total("macs_kept"), "parameters": whole}
    kept = parameters(network) - (total("zeros") - gone)
    return sums | {"parameters_kept": kept, "sparsity": total("zeros") / total("weights")}
