"""Evaluate a checkpoint: accuracy, sparsity by layer, and whether the blocks are whole."""

import models
import pruning
from jobs.parts import Parts, compare_with_dense, export, in_words
from utils import report
from utils.kept import Kept


def evaluate(parts: Parts) -> None:
    """Show what --evaluate names; with --export_onnx, write `model.onnx` too.

    A checkpoint that holds more than a dense network (scores without masks) needs the method that makes one of it.
    """
    options, network, method, images = parts.options, parts.network, parts.method, parts.images()
    facts = models.load_checkpoint(network, options.evaluate)
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
        kept = {name: Kept("blocks", rate=1.0, N=N) for name, (N, _) in lengths.items()}
        export(parts, network, kept, images)
