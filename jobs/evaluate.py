"""Evaluate a checkpoint: accuracy, sparsity by layer, and whether the blocks are whole."""

import torch
from torch import nn

import models
import pruning
from jobs.checkpoint import check_pictures
from jobs.folder import set_aside
from jobs.parts import Parts, compare_with_dense, export, in_words, summarise
from utils import report
from utils.files import save_json, sha256
from utils.kept import Kept


def evaluate(parts: Parts) -> None:
    """Show what --evaluate names; with --export_onnx, write `model.onnx` too.

    A checkpoint that holds more than a dense network (scores without masks) needs the method that makes one of it.
    """
    options, network, method, images = parts.options, parts.network, parts.method, parts.images()
    check_pictures(options.evaluate, options)
    facts = models.load_checkpoint(network, options.evaluate, parts.train.classes, **method.reading())
    models.plainify(network)
    if facts["extras"]:
        method.accept(facts["extras"])
        method.attach(network)
        pruning.finish(method, network, images)
    figures = parts.evaluate(network)
    costs, sums = compare_with_dense(parts, network, images)
    lengths = pruning.find_blocks(network, options.evaluation.N)
    rows = [["layer", "shape", "sparsity", "blocks"]]
    for name, cost in costs.items():
        shape = " -> ".join("x".join(map(str, shape)) for shape in (cost.shape, cost.left) if shape)
        rows.append([name, shape, f"{100 * (1 - cost.density):.2f} %", lengths.get(name, ("", ""))[1]])
    report.show(rows, str(options.evaluate), parts.screen)
    parts.screen.print(
        f"{options.evaluate}: {in_words(figures)}; sparsity {100 * sums['sparsity']:.2f} %, "
        f"multiply-adds {sums['macs_kept']:,} of {sums['macs']:,}" + (f"; {facts['note']}" if "note" in facts else "")
    )
    if options.export_onnx and parts.ranks.first:
        hand_over(parts, network, figures, {name: N for name, (N, _) in lengths.items()}, images)


def hand_over(parts: Parts, network: nn.Module, figures: dict, lengths: dict[str, int], images: torch.Tensor) -> None:
    """Write `model.onnx` and a report of the network in it; reports of another network are moved aside.

    A run's own report of this very file stays: only its export is new.
    """
    options = parts.options
    summary = report.read(options.job_dir)
    same = summary.get("checkpoint", {}).get("sha256") == sha256(options.evaluate)
    if not same:
        set_aside(options.job_dir, report.REPORTS)
    fixed = export(parts, network, {name: Kept("blocks", rate=1.0, N=N) for name, N in lengths.items()}, images)
    if same:
        save_json(options.job_dir / "summary.json", summary | {"onnx_sha256": sha256(options.job_dir / "model.onnx")})
        report.write(options.job_dir, parts.screen)
        return
    kept = {name: Kept(f"blocks of 1x{N}", N=N) for name, N in lengths.items()}
    costs = compare_with_dense(parts, network, images)
    summarise(parts, network, options.evaluate, {"accuracy": {"tuned": figures}, "not_reached": []}, costs, kept, fixed)
