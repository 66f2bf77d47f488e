"""What works on the convolutional networks of timm and torchvision: traced, made plain, pruned, exported, compiled.

python benchmarks/zoo.py

Every network of `zoo_names.txt` (up to 30 million parameters) is built with random weights, under which its outputs
depend on the picture, and goes through all stages at 64 pixels, one process a network. What happened is kept in
`results/zoo.json` at once, so that the command goes on where it was stopped. Writes
`results/zoo.md`, a table by family.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import models
import pruning
from benchmarks.jobs import RESULTS, command
from pruning.method import relative_error
from structure import Graph, evaluating, shrink
from structure.plain import in_words
from utils import machine
from utils.files import save_json, save_text
from utils.report import markdown

NAMES = Path(__file__).with_name("zoo_names.txt")
METHODS = {
    "block_l1": {"N": 16, "pr_target": 0.5, "rearrange": True},
    "resrep": {"flops_target": 0.7},
    "stripe": {"pr_target": 0.5, "threshold": 0.1},
}
STAGES = ("trace", *METHODS, "shrink", "gather", "export", "compile")
TOLERANCE = 1e-4  # of a compiled network, relative to the largest output
SLOWEST = 900  # seconds that one network may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NAMES.read_text().split())
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.md")
    parser.add_argument("--only", help="print what happens to this network, and write nothing")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(examine(options.only, options.image_size, options.stages)))
        return
    kept = options.out.with_suffix(".json")
    records = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.networks:
        if not set(options.stages) <= records.get(name, {}).get("stages", {}).keys():
            records[name] = apart(name, options.image_size, options.stages)
            save_json(kept, records)
            print(name, json.dumps(records[name]["stages"]), flush=True)
    save_text(options.out, report(records))


def apart(name: str, size: int, stages: tuple[str, ...]) -> dict:
    """What `examine` says, from a process of its own: one that dies takes no other network with it."""
    words = [sys.executable, __file__, "--only", name, "--image_size", str(size), "--stages", *stages]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SLOWEST, env=alone, check=False)
    except subprocess.TimeoutExpired:
        return {"stages": dict.fromkeys(stages, f"takes longer than {SLOWEST} seconds")}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        told = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return {"stages": dict.fromkeys(stages, told)}
    return json.loads(lines[-1])


def examine(name: str, size: int = 64, stages: tuple[str, ...] = STAGES) -> dict:
    """What happens to a network: `stages`, each "ok" or the reason why not, `plain`, what was made plain, and figures.

    A stage that depends on one that failed is left out.
    """
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    images = torch.randn(4, 3, size, size)
    network = models.create_model(name, 10)
    record = {"millions": round(sum(p.numel() for p in network.parameters()) / 1e6, 2), "stages": {}}
    calibrate(network, images)
    record["differs"] = float(f"{dependence(network, images):.1e}")
    with evaluating(network), torch.no_grad():
        before = network.double()(images.double())
        network.float()
        record["plain"] = in_words(models.plainify(network))
        after = network.double()(images.double())
        network.float()
    record["plain_error"] = float(f"{relative_error(after, before):.1e}")
    done: dict[str, object] = {}

    def attempt(stage: str, work: Callable, needs: str | None = None) -> None:
        if stage in stages and (needs is None or needs in done):
            start = time.perf_counter()
            try:
                done[stage] = work()
                record["stages"][stage] = "ok"
            except Exception as error:  # a stage may fail in any way: that is what is asked here
                record["stages"][stage] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"[:300]
            record.setdefault("seconds", {})[stage] = round(time.perf_counter() - start, 2)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        attempt("trace", lambda: layers_of(Graph(network)))
        for method in METHODS:
            attempt(method, partial(pruned, network, method, images), "trace")
        attempt("shrink", lambda: pruning.proven_copy(done["block_l1"][0], shrink, images), "block_l1")
        attempt("gather", lambda: gathered(*done["block_l1"], images), "block_l1")
        attempt("export", lambda: export(done["gather"], images, path), "gather")
        attempt("compile", lambda: compiled(path, images), "export")
    record["layers"] = done.get("trace")
    return record


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor) -> None:
    """Make the outputs of a new network depend on the picture.

    Scales that start at zero or near it (of a block's last norm, of a layer) become about one, and batch norms take the
    statistics of what they read, so that no signal dies out on the way.
    """
    for module in network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1 and key != "bias":
                parameter.uniform_(0.5, 1.5)
            elif key.endswith(("gamma", "layer_scale", "gain")):
                parameter.fill_(1.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum, module.kept_momentum = None, module.momentum
            module.reset_running_stats()
    network.train()
    network(images)
    for module in network.modules():
        if hasattr(module, "kept_momentum"):
            module.momentum = module.kept_momentum
            del module.kept_momentum
    network.eval()


@torch.no_grad()
def dependence(network: nn.Module, images: Tensor) -> float:
    """How far outputs differ between pictures, as a share of the largest."""
    outputs = network.eval()(images)
    return float(outputs.std(0).max() / outputs.abs().max())


def layers_of(graph: Graph) -> dict[str, int]:
    """How many layers may be pruned, and in how many of them filters may be reordered, or channels removed."""
    spaces = [graph.output[name] for name in graph.masked_layers()]
    return {
        "all": len(spaces),
        "free": sum(not space.fixed for space in spaces),
        "sliceable": sum(not space.whole for space in spaces),
    }


def pruned(network: nn.Module, name: str, images: Tensor) -> tuple[nn.Module, dict]:
    """The network pruned by the method as if it had been trained, and what was kept; its outputs are proven to stay."""

    network = copy.deepcopy(network)
    method = pruning.create_method(name, **METHODS[name])
    method.check(network)
    method.attach(network)
    with torch.no_grad():  # what training would do to every second filter, or stripe
        for module in network.modules():
            if hasattr(module, "compactor"):
                module.compactor.weight[::2] = 0
            if hasattr(module, "FilterSkeleton"):
                module.FilterSkeleton[::2] = 0
    kept = pruning.finish(method, network, images)
    if not kept:
        raise ValueError("nothing was pruned")
    return network, kept


def gathered(network: nn.Module, kept: dict, images: Tensor) -> nn.Module:
    """The network with its blocks as consecutive rows."""
    lengths = {name: layer.N for name, layer in kept.items() if layer.in_blocks}
    return pruning.proven_copy(network, partial(pruning.gather_blocks, lengths=lengths), images)[0]


def export(network: nn.Module, images: Tensor, path: Path) -> float:
    from utils.export import export_onnx

    return export_onnx(network, images, path)


def compiled(path: Path, images: Tensor) -> float:
    """The largest error of the compiled network, relative to the largest output of ONNX Runtime."""
    import numpy as np
    import onnxruntime

    import deploy

    expected = onnxruntime.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0]
    found = deploy.compile_onnx(path, threads=1, batch=len(images)).run(images.numpy())
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise ValueError(f"differs from ONNX Runtime by {error:.1e}")
    return error


def family(name: str) -> str:
    """The library, and the letters that a network's name begins with."""
    library, _, own = name.partition("/")
    own = own.removeprefix("tf_").removeprefix("test_")
    return f"{library}/{own[: next((n for n, letter in enumerate(own) if letter in '0123456789_'), len(own))]}"


def report(records: dict[str, dict]) -> str:
    """The table by family, and the reasons of all refusals with the networks that they concern."""
    families: dict[str, list[dict]] = {}
    reasons: dict[str, list[str]] = {}
    for name, record in records.items():
        families.setdefault(family(name), []).append(record["stages"])
        for stage, said in record["stages"].items():
            if said != "ok":
                reasons.setdefault(f"{stage}: {said}", []).append(name)

    def row(title: str, entries: list[dict]) -> list[str]:
        traced = [entry for entry in entries if entry.get("trace") == "ok"]
        cells = [f"{sum(entry.get(stage) == 'ok' for entry in traced)} / {len(traced)}" for stage in STAGES[1:]]
        return [title, f"{len(traced)} / {len(entries)}", *cells]

    everyone = [record["stages"] for record in records.values()]
    rows = [["networks", *STAGES], row("**all**", everyone)]
    rows += [row(name, entries) for name, entries in sorted(families.items())]
    lines = ["# Networks of timm and torchvision, up to 30 million parameters", "", markdown(rows)]
    lines += ["Every stage counts the networks that `torch.fx` traces. Why the others fail:", ""]
    for reason, names in sorted(reasons.items(), key=lambda entry: (-len(entry[1]), entry[0])):
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lines.append(f"- {reason} ({len(names)}: {shown})")
    return "\n".join([*lines, "", f"- Command: `{command()}`", f"- Machine: {machine.line()}"]) + "\n"


if __name__ == "__main__":
    main()
