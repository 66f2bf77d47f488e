"""What a run is made of, and what pruning and evaluating have in common."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import models
import pruning
from data import Loader
from jobs.pictures import image_size
from utils import report
from utils.count import Cost, beside, count, totals
from utils.export import export_onnx
from utils.files import sha256
from utils.kept import Kept
from utils.options import Options
from utils.ranks import Ranks
from utils.run import evaluate


@dataclass
class Parts:
    """The parts of a run.

    Attributes:
        network: on the device; dense, until the method is attached.
        train, val: what this process sees of the pictures.
        ranks: the processes that share every batch.
        accuracy: loss, top-1 and top-5 by stage ("dense", "pruned", "repaired", "tuned").
        errors: layer -> its relative error after the repair.
        data: what tells the pictures from others.
    """

    options: Options
    method: pruning.Method
    network: nn.Module
    train: Loader
    val: Loader
    ranks: Ranks
    screen: Console
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    data: dict[str, dict] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.options.job_dir / "checkpoint"

    def images(self) -> torch.Tensor:
        """A few pictures (B, 3, H, W) of the validation set, to prove equalities on."""
        return next(iter(self.val))[0][:8]

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Loss, top-1 and top-5 (per cent) on the validation set."""
        return evaluate(network, self.val, self.ranks)


def in_words(figures: dict[str, float]) -> str:
    """What `Parts.evaluate` returns, for the screen."""
    return f"top-1 {figures['top1']:.2f}, top-5 {figures['top5']:.2f}, loss {figures['loss']:.4f}"


def create_network(options: Options, num_classes: int = 1000) -> nn.Module:
    """The dense network of a run, made of plain layers: to ask its structure, and to compare with."""
    network = models.create_model(options.arch, num_classes, **options.arguments())
    models.plainify(network)
    return network


def compare_with_dense(parts: Parts, network: nn.Module, images: torch.Tensor) -> tuple[dict[str, Cost], dict]:
    """Costs by layer and in all, where channels that the dense network has, and this one has not, are zeros."""
    dense = create_network(parts.options, network.num_classes)
    costs = beside(count(dense, images[:1].cpu()), count(network, images[:1]))
    return costs, totals(network, costs, dense)


def export(parts: Parts, network: nn.Module, kept: dict[str, Kept], images: torch.Tensor) -> dict[str, str]:
    """Write `model.onnx` with blocks as consecutive rows. Returns why not, for the layers where that is impossible."""
    lengths = {name: layer.N for name, layer in kept.items() if layer.in_blocks}
    network, fixed = pruning.proven_copy(network, partial(pruning.gather_blocks, lengths=lengths), images)
    error = export_onnx(network, images, parts.options.job_dir / "model.onnx", parts.val.preparation())
    parts.screen.print(f"written: {parts.options.job_dir}/model.onnx (ONNX Runtime agrees to {error:.1e})")
    return fixed


def summarise(
    parts: Parts,
    network: nn.Module,
    file: Path,
    facts: dict,
    costs: tuple[dict[str, Cost], dict],
    kept: dict[str, Kept],
    fixed: dict[str, str],
) -> None:
    """Write the report of a network: `summary.json`, which names it by digests, and what is drawn from that.

    Args:
        file: the checkpoint that holds the network.
        facts: what only the caller knows: accuracy, not_reached.
        costs: as `compare_with_dense` gives them.
        kept, fixed: as `report.save_summary` takes them.
    """
    options, (layers, sums) = parts.options, costs
    onnx = sha256(options.job_dir / "model.onnx") if options.export_onnx else None
    head = {"arch": network.arch, "image_size": image_size(options), "options": options.to_json()}
    head |= {"checkpoint": {"file": str(file), "sha256": sha256(file)}, "onnx_sha256": onnx}
    head |= {"data_set": options.data_set, "method": str(parts.method), "totals": sums} | facts
    report.save_summary(options.job_dir, head, layers, kept, fixed)
    report.write(options.job_dir, parts.screen)
