"""An exponential moving average of a network's weights, to evaluate and to keep instead of the last ones."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Average:
    """`average = decay * average + (1 - decay) * network` after every update, of parameters and batch-norm statistics.

    Masks and other buffers that are not statistics are the network's own and not averaged.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay = network, decay
        self.tensors = [tensor.detach().clone() for tensor in self._live()]

    def _live(self) -> list[Tensor]:
        statistics = [buffer for name, buffer in self.network.named_buffers() if "running_" in name]
        return [*self.network.parameters(), *statistics]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.tensors, self._live(), 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's weights with the average; twice is nothing."""
        for mine, live in zip(self.tensors, self._live(), strict=True):
            kept = live.clone()
            live.copy_(mine)
            mine.copy_(kept)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the averaged weights inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def load(self, tensors: list[Tensor]) -> None:
        for mine, saved in zip(self.tensors, tensors, strict=True):
            mine.copy_(saved)
