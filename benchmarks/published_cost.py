"""The count of FLOPs and parameters by which stripe-wise pruning (Meng et al. 2020) reports its results."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structure import evaluating


@dataclass
class PublishedCost:
    """By its rules: two FLOPs a multiply-add, and all else counted, too."""

    flops: int
    parameters: int


def published_cost(network: nn.Module, image: Tensor, skeletons: bool = False) -> PublishedCost:
    """What the publication's counter says of a plain network whose zero stripes are taken as gone.

    Args:
        image: (1, 3, H, W).
        skeletons: count a shape, kernel positions by filters, for every convolution, as its files have.
    """
    chained = {child for module in network.modules() if isinstance(module, nn.Sequential) for child in module}
    flops = []

    def add(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        values = output[0].numel()
        if isinstance(layer, nn.Conv2d):
            flops.append(2 * int(layer.weight.count_nonzero()) * output[0, 0].numel())
        elif isinstance(layer, nn.Linear):
            flops.append(2 * layer.weight.numel() + layer.bias.numel())
        elif isinstance(layer, nn.BatchNorm2d):
            flops.append(2 * values)
        elif isinstance(layer, nn.ReLU):
            flops.append(values * (layer in chained))  # elsewhere its networks call a function, which goes uncounted
        elif isinstance(layer, nn.MaxPool2d):
            flops.append(values * layer.kernel_size**2)
        elif isinstance(layer, nn.AdaptiveAvgPool2d) and inputs[0].shape == output.shape:
            flops.append(values)  # VGG has a module that pools single pixels; ResNet calls a function

    hooks = [module.register_forward_hook(add) for module in network.modules()]
    try:
        with torch.no_grad(), evaluating(network):
            network(image)
    finally:
        for handle in hooks:
            handle.remove()
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    parameters = sum(p.numel() for p in network.parameters())
    parameters -= sum(layer.weight.numel() - int(layer.weight.count_nonzero()) for layer in convolutions)
    shapes = sum(len(layer.weight) * layer.weight[0, 0].numel() for layer in convolutions)
    return PublishedCost(sum(flops), parameters + shapes * skeletons)
