"""Runs of a second: a small network on digits, under every method, with settings by which something happens in time."""

import torch
from torch import nn

import data
import pruning
from utils.loss import Loss
from utils.run import Run


def small_network(num_classes: int = 10) -> nn.Sequential:
    layers = [layer for i in (3, 8, 8) for layer in (nn.Conv2d(i, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def run_of(name: str, ema: float | None = None, **options) -> tuple[Run, data.Loader]:
    """Two epochs of six steps of a small network on digits, and the pictures to evaluate by."""
    torch.manual_seed(0)
    network = small_network()
    asked = {"data_path": None, "image_size": 16, "train_batch_size": 16, "eval_batch_size": 64, "seed": 0}
    loaders = data.create_loaders("digits", **asked, device=torch.device("cpu"), workers=0, skip_bad=False)
    for loader in loaders:
        loader.limit = 6
    method = pruning.create_method(name, **options)
    method.attach(network)

    def make(parameters):
        return torch.optim.SGD(parameters, 0.05, momentum=0.9)

    return Run(network, method, loaders[0], Loss(), 2, lambda *_: 0.05, make, ema=ema), loaders[1]


# Settings under which a run this short selects, forgets and shrinks.
EAGER = {
    "block_l1": {"N": 4, "schedule": "cubic", "schedule_every": 2},
    "resrep": {"flops_target": 0.6, "before_mask_iters": 0, "mask_interval": 1, "lasso_strength": 1.0},
    "block_random": {"N": 4},
    "imp": {"rounds": 2},
    "stripe": {"schedule_end": 0.5},
}
PLAIN = {nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear, nn.Identity}
