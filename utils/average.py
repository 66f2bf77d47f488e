"""An exponential moving average of a network's weights, to evaluate and to keep instead of the last ones."""

import copy

import torch
from torch import Tensor, nn


def statistics(network: nn.Module) -> list[Tensor]:
    """The running means and variances of all batch norms."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]


class Average:
    """A copy of `network` with averaged weights: `average = d * average + (1 - d) * network` after every update.

    Parameters and batch-norm statistics are averaged. Other buffers (masks, counters) are no quantities of which a mean
    makes sense: the copy takes the network's as they are. The network itself is only read. Parameters that share memory
    there (scores with weights) have memory of their own here, and equal values still.

    After n updates the decay d is min(decay, (1 + n) / (10 + n)), so that the average of a short run does not stay near
    the initial weights. This is the rule of TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.live, self.decay, self.since = network, decay, 0
        self.copy = copy.deepcopy(network).requires_grad_(False)
        # Listed once: walking over the modules takes longer than updating a small network.
        self.averages, self.values = ([*part.parameters(), *statistics(part)] for part in (self.copy, network))

    @torch.no_grad()
    def restart(self, updates: int) -> None:
        """Forget what has been averaged: start from the weights as they are, after that many updates."""
        self.since = updates
        torch._foreach_copy_(self.averages, self.values)

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after that many updates of the network, of which 1 or more since the start."""
        updates -= self.since
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self.averages, self.values, 1 - decay)

    @torch.no_grad()
    def network(self) -> nn.Module:
        """The copy as it stands; its masks and counters are the network's of this moment."""
        averages = set(map(id, self.averages))
        for mine, theirs in zip(self.copy.buffers(), self.live.buffers(), strict=True):
            if id(mine) not in averages:
                mine.copy_(theirs)
        return self.copy
