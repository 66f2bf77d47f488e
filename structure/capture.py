"""Run a network and leave it as it was: in eval mode, and looking at what its layers read."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Kept = TypeVar("Kept")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put `network` into eval mode inside the `with` block; afterwards every module has its own mode back."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def layer_inputs(
    network: nn.Module, names: Iterable[str], batches: Iterable[Tensor], keep: Callable[[Tensor], Kept] = torch.clone
) -> Iterator[dict[str, list[Kept]]]:
    """What the layers called `names` read while `network` evaluates `batches`, one batch after the other.

    The network runs in eval mode and without gradients. Only the inputs of one batch are held at a time. Where those of
    many layers are too large together, `keep` can turn each input into something smaller (a norm, a Gram matrix) as
    soon as it is read.

    Args:
        names: names of layers, as in `network.named_modules()`.
        batches: images (B, 3, H, W), on the network's device.
        keep: makes of an input (B, ...) what is returned. By default it copies the input, since the layers that follow
            may overwrite it.

    Returns:
        an iterator; for each batch a dictionary: layer name -> what `keep` returned, once for each time that the
        network called the layer.

    Raises:
        ValueError: the network has no such layer.
    """
    modules, names = dict(network.named_modules()), list(names)
    for name in names:
        if name not in modules:
            raise ValueError(f"{name}: {type(network).__name__} has no such layer")
    return (_one_batch(network, {name: modules[name] for name in names}, images, keep) for images in batches)


@torch.no_grad()
def _one_batch(network: nn.Module, layers: dict[str, nn.Module], images: Tensor, keep: Callable) -> dict[str, list]:
    kept = {name: [] for name in layers}

    def hook(name: str) -> Callable:
        return lambda layer, inputs: kept[name].append(keep(inputs[0]))

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with evaluating(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept
