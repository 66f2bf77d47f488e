"""Multiply-adds and parameters of convolutions and linear layers, all and kept."""

from dataclasses import dataclass


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
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            network.eval()(image)
    finally:
        for handle in hooks:
            handle.remove()
    return costs


def totals(network, costs: dict[str, Cost]) -> dict[str, float]:
    """Sums over the network: multiply-adds and parameters, all and kept, and the share of weights that are zero.

    Parameters include those of batch-norm, which no layer's `Cost` counts.
    """

    def total(key: str) -> int:
        return sum(getattr(cost, key) for cost in costs.values())

    parameters = sum(parameter.numel() for parameter in network.parameters())
    sums = {"macs": total("macs"), "macs_kept": total("macs_kept"), "parameters": parameters}
    return sums | {"parameters_kept": parameters - total("zeros"), "sparsity": total("zeros") / total("weights")}
