"""Multiply-adds and parameters of a network, all and kept."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Cost:
    """Of one convolution or linear layer, for one picture. A multiply-add counts as one; zeros are not kept."""

    shape: tuple[int, ...]  # of the weight
    macs: int
    parameters: int  # weight and bias
    weights: int
    zeros: int

    @property
    def density(self) -> float:
        return 1 - self.zeros / self.weights

    @property
    def macs_kept(self) -> int:
        return round(self.macs * self.density)


@torch.no_grad()
def count(network: nn.Module, image: Tensor) -> dict[str, Cost]:
    """Costs of every convolution and linear layer that `image` (1, 3, H, W) passes through, in that order."""
    costs: dict[str, Cost] = {}

    def hook(name: str):
        def add(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            weight = layer.weight
            parameters = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
            zeros = weight.numel() - int(weight.count_nonzero())
            # An output value of a convolution costs one multiply-add a weight of its filter.
            macs = output[0].numel() * weight[0].numel()
            costs[name] = Cost(tuple(weight.shape), macs, parameters, weight.numel(), zeros)

        return add

    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        network.eval()(image)
    finally:
        for handle in hooks:
            handle.remove()
    return costs


def totals(network: nn.Module, costs: dict[str, Cost]) -> dict[str, float]:
    """Sums over the network: multiply-adds and parameters, all and kept, and the share of weights that are zero."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    zeros, weights = (sum(getattr(cost, key) for cost in costs.values()) for key in ("zeros", "weights"))
    return {
        "macs": sum(cost.macs for cost in costs.values()),
        "macs_kept": sum(cost.macs_kept for cost in costs.values()),
        "parameters": parameters,
        "parameters_kept": parameters - zeros,
        "sparsity": zeros / weights,
    }
