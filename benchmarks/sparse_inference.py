"""Latency of block-sparse networks beside dense runtimes of others, and our own dense build, in every type.

python benchmarks/sparse_inference.py --threads 1 2 --dtypes float32 bfloat16 int8
python benchmarks/sparse_inference.py --layers mobilenet_v1 32 50 --dtypes int8

Weights are random, since only speed and equality are asked: every network is pruned one-shot, exported, compiled, and
proven equal to ONNX Runtime. All builds of a network, and the peers of `deploy/peers.py` that are installed, take turns
in one process of their own, with pauses. For int8, networks are quantised with random pictures; the int8 peers run the
dense one.
Interrupted, it goes on where it was: what `results/sparse_inference.json` holds of all peers is not measured again
without --again. Writes the tables and figures of `results/sparse_inference.md`. --layers prints one network kernel by
kernel instead; --missed writes `results/sparse_layers.md`, of all builds in `sparse_inference.json` that are slower
than their target.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs import RESULTS, ROOT
from benchmarks.sparse_points import (
    DENSE,
    KNOWN,
    KNOWN_POINTS,
    POINTS,
    SUMS,
    TARGETS,
    Point,
    builds,
    goal,
    missed,
    ratio,
)
from benchmarks.sparse_report import speed_table, write
from deploy.peers import PACKAGES, PEERS
from deploy.targets import DTYPES
from utils import machine
from utils.files import save_json, save_text
from utils.report import markdown

CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "vgg16_bn")  # 32 pixels a side, ten classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[*TARGETS, KNOWN])
    parser.add_argument("--points", nargs="+", type=Point.parse, help="N:per cent, as 16:50; default: the table's")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"], help="--layers: the first")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=200, help="timed calls of every build")
    parser.add_argument("--image_size", type=int, help="default: 224, CIFAR's networks 32")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=ROOT / "experiments" / "sparse_inference", help="of ONNX files")
    parser.add_argument("--layers", nargs=3, metavar=("NETWORK", "N", "RATE"), help="kernel by kernel; 0 0 is dense")
    parser.add_argument("--missed", action="store_true", help="kernel by kernel, what is slower than its target")
    options = parser.parse_args()
    if options.layers:
        name, *point = options.layers
        print_layers(options, name, Point(*map(int, point), options.dtypes[0]))
    elif options.missed:
        write_missed(options)
    else:
        print_and_write(options)


def print_layers(options: argparse.Namespace, name: str, point: Point) -> None:
    file = exported(options, name, point)
    for threads in options.threads:
        print(in_a_process(layers, file, threads, options.runs, point.dtype))


def write_missed(options: argparse.Namespace) -> None:
    """`sparse_layers.md`: the kernels of every build that is slower than its target."""
    parts, how = [], circumstances()
    for entry in json.loads((options.out / "sparse_inference.json").read_text()).values():
        for point in missed(entry):
            file = exported(options, entry["network"], point)
            reached = ratio(entry, builds(entry)[point]["ms"], point.dtype)
            table = in_a_process(layers, file, entry["threads"], options.runs, point.dtype)
            parts.append(f"## {entry['network']}, {point.label}: {reached:.2f} of {goal(entry, point):g}\n\n{table}\n")
            print(parts[-1], flush=True)
    told = f"Medians of {options.runs} runs, means of them where a kernel is called more than once."
    parts.insert(0, f"# Kernels of the builds that miss their target\n\n{told}\n")
    parts.append(f"`{how['command']}`: {machine.line(how['machine'])}\n")
    save_text(options.out / "sparse_layers.md", "\n".join(parts))


def print_and_write(options: argparse.Namespace) -> None:
    how, results = circumstances(), options.out / "sparse_inference.json"  # before results make the checkout dirty
    entries = json.loads(results.read_text()) if results.exists() else {}
    for name in options.networks:
        points = [DENSE, *(options.points or (KNOWN_POINTS if name == KNOWN else POINTS))]
        points = [point._replace(dtype=dtype) for dtype in options.dtypes for point in points]
        for threads in options.threads:
            key = f"{name} {image_size(options, name)} {threads}"
            if not options.again and covers(entries.get(key), points, options.runs):
                print(
                    f"{key}: there since {entries[key]['date']}, commit {entries[key]['machine']['commit']}", flush=True
                )
                continue
            files = {str(point): exported(options, name, point) for point in [DENSE, *points]}
            print(f"{name}, {threads} thread(s), {', '.join(options.dtypes)}", flush=True)
            measured = in_a_process(measure_network, files, threads, options.runs)
            facts = {"network": name, "image_size": image_size(options, name), "threads": threads}
            entries[key] = facts | {"runs": options.runs} | measured | how
            save_json(results, entries)
            print("\n".join(" | ".join(row) for row in speed_table([entries[key]])), flush=True)
    write(list(entries.values()), options.out)


def image_size(options: argparse.Namespace, name: str) -> int:
    return options.image_size or (32 if name in CIFAR else 224)


def covers(entry: dict | None, points: list[Point], runs: int) -> bool:
    """Whether an entry of the results holds all that is asked."""
    if not entry or entry["runs"] < runs or not entry.get("peer_facts", {}).keys() >= PEERS.keys():
        return False
    there = {str(point) for point in points if point.dtype not in entry.get("absent", {})}
    return there <= entry["builds"].keys()


def in_a_process(function, *arguments):
    """What `function` returns in a fresh process: TVM's threads are configured once a process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def circumstances() -> dict:
    where = machine.describe() | {"tunables": os.environ.get("GLIBC_TUNABLES")}
    where["versions"] |= machine.versions(PACKAGES)
    command = " ".join(["python", "benchmarks/sparse_inference.py", *sys.argv[1:]])
    return {"machine": where, "command": command, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"}


# The networks


def exported(options: argparse.Namespace, name: str, point: Point) -> Path:
    """The ONNX file of a network with random weights, pruned at `point`."""
    size = image_size(options, name)
    path = options.cache / f"{name}_{size}" / f"{point.N}_{point.rate}" / "model.onnx"
    if not path.exists():
        print(f"exporting {name}, {point.label}", flush=True)
        in_a_process(export, name, size, point, path)
    return path


def export(name: str, size: int, point: Point, path: Path) -> None:
    """Prune as `imagenet.py` does, normalise for noise so that every layer has work to do, and export."""
    import torch

    import models
    import pruning
    from utils.export import export_onnx

    torch.manual_seed(0)
    network, images = models.create_model(name, 10 if name in CIFAR else 1000), torch.randn(4, 3, size, size)
    blocks = {"N": point.N, "pr_target": point.rate / 100}
    method = pruning.create_method("block_l1", **blocks) if point.N else pruning.create_method("dense")
    method.attach(network)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            module.momentum = 1  # one pass sets the statistics
    with torch.no_grad():
        network.train()(images)
    kept = pruning.finish(method, network, images)
    lengths = {name: layer.N for name, layer in kept.items() if layer.in_blocks}
    network, _ = pruning.proven_copy(network, lambda copy: pruning.gather_blocks(copy, lengths), images)
    export_onnx(network, images, path)


# Measured, each in a process of its own


def measure_network(files: dict[str, Path], threads: int, runs: int) -> dict:
    """Compile the network at every point, compare it with ONNX Runtime, and time all builds and peers in turns.

    files: by point, the ONNX file in float32.
    """
    import tvm  # noqa: F401  # importing is not compiling

    import deploy
    from deploy import peers, proof, targets
    from deploy.runtime import startup
    from deploy.tuning import clock, measure

    dense = files[str(DENSE)]
    pictures = np.load(dense.parent / "inputs.npy")
    shape = [1, *pictures.shape[1:]]
    runners, facts = peers.start(PEERS, dense, quantised(dense), threads, shape)
    for name, fact in facts.items():
        if "absent" in fact:
            print(f"  {PEERS[name].title} is not timed: {fact['absent']}", flush=True)
    # Random weights make much of a rounding: bfloat16 may be as far from float32 as twice what OpenVINO's is.
    rounding = {}
    if "openvino_default" in runners:
        theirs = measure.compare(runners["openvino_default"], measure.peer(dense, threads), pictures, 1)[0]
        rounding["bfloat16"] = 2 * theirs
        print(f"  OpenVINO as installed differs from ONNX Runtime by {theirs:.1e}", flush=True)
    sparse = [name for name in runners if PEERS[name].sparse]
    found, absent = {}, {}
    for point, file in files.items():
        dtype = Point.parse(point).dtype
        try:
            targets.find_machine().with_dtype(dtype)
        except ValueError as problem:
            absent[dtype] = str(problem)
            continue
        source, start = quantised(file) if dtype == "int8" else file, time.perf_counter()
        library = deploy.compile_onnx(source, threads=threads, dtype=dtype)
        seconds = time.perf_counter() - start
        error, top1 = measure.compare(library.run, measure.peer(source, threads), pictures, 1)
        if not error <= max(proof.allowed(dtype, source, pictures, 1), rounding.get(dtype, 0.0)):
            raise ValueError(f"{source}: the {dtype} library differs from ONNX Runtime by {error:.1e}")
        found[point] = {"compile_s": round(seconds, 2), "error": error, "top1": top1, **work(file, dtype)}
        print(f"  {Point.parse(point).label}: compiled in {seconds:.1f} s, error {error:.1e}", flush=True)
        folder = file.parent / "deploy" / dtype
        library.save(folder)
        found[point]["weight_bytes"] = (folder / "weights.bin").stat().st_size
        found[point]["start_up"] = startup.measure(folder)
        runners[point] = library.run
        if file != dense and dtype == "float32":
            there, _ = peers.start(sparse, file, "", threads, shape)
            runners |= {f"{name} {point}": run for name, run in there.items()}
    timers = {name: measure.timer(run) for name, run in runners.items()}
    latency = measure.race(timers, pictures[:1], runs)
    for point, build in found.items():
        build["ms"] = latency[point]
        build["peers"] = {name: latency[f"{name} {point}"] for name in sparse if f"{name} {point}" in latency}
    times = {name: latency[name] for name in PEERS if name in latency}
    measured = {"peers": times, "peer_facts": facts, "builds": found, "absent": absent}
    return measured | {"peak_gflops": clock.peak_gflops(replace(targets.find_machine(), threads=threads))}


def quantised(file: Path) -> Path:
    """The network in int8, beside it."""
    import deploy
    from deploy.tuning import measure

    out = file.parent / "int8.onnx"
    if not out.exists():
        deploy.quantise(file, list(measure.batches(np.load(file.parent / "inputs.npy"), 1)), out)
    return out


def work(file: Path, dtype: str = "float32") -> dict:
    """Of one picture: operations with weights other than zero, and bytes of the two largest activations in `dtype`."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {value.name: [d.dim_value or 1 for d in value.type.tensor_type.shape.dim] for value in graph.value_info}
    shapes |= {value.name: [d.dim_value or 1 for d in value.type.tensor_type.shape.dim] for value in graph.output}
    flops, floats = 0, []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = int(np.count_nonzero(onnx.numpy_helper.to_array(weights[node.input[1]])))
            _, channels, *pixels = shapes[node.output[0]]
            flops += 2 * weight * math.prod(pixels)
            floats.append(channels * math.prod(pixels))
    return {"mflop": flops / 1e6, "activation_bytes": 4 // SUMS[dtype] * sum(sorted(floats)[-2:])}


def layers(file: Path, threads: int, runs: int, dtype: str = "float32") -> str:
    """A table of every kernel; for those of convolutions and classifiers, the rate of work on kept weights.

    A kernel may compute two layers, one inside the other. Of a depthwise convolution inside its successor's kernel, the
    time counts there and the work not.
    """
    import deploy
    from deploy.tuning import clock, measure

    source = quantised(file) if dtype == "int8" else file
    library = deploy.compile_onnx(source, threads=threads, dtype=dtype)
    times = measure.kernel_times(library, np.load(file.parent / "inputs.npy")[:1], runs)
    alike: dict[str, list[float]] = {}  # kernels of one name differ in nothing but their weights
    for name, ms in times:
        alike.setdefault(name, []).append(ms)
    total, mflop, peak = sum(ms for _, ms in times), work(file)["mflop"], clock.peak_gflops(library.machine)
    table = [["kernel", "calls", "us each", "of all", "shape", "N", "density", "pixels", "GFLOP/s", "of peak"]]
    for name, found in alike.items():
        rows = [row for row in library.info["layers"] if row["function"] == name]
        told = [name, str(len(found)), f"{1e3 * statistics.mean(found):.1f}", f"{sum(found) / total:.1%}"]
        if rows:
            flop = sum(2 * np.prod(row["shape"]) * row["density"] * row["pixels"] for row in rows)
            gflops, rows = flop / sum(found) / 1e6, rows[: len(rows) // len(found)]
            shapes = ["x".join(map(str, row["shape"])) for row in rows]
            facts = [shapes, *([row[key] or "" for row in rows] for key in ("N", "density", "pixels"))]
            told += [", ".join(map(str, fact)) for fact in facts] + [f"{gflops:.0f}", f"{gflops / peak:.0%}"]
        table.append(told + [""] * (len(table[0]) - len(told)))
    rate = mflop / total
    return (
        f"{markdown(table)}\n{threads} thread(s): {total:.3f} ms in kernels, {mflop / 1e3:.3f} GFLOP on kept weights,"
        f" {rate:.0f} GFLOP/s, {rate / peak:.0%} of the peak of {peak} that float32 multiply-adds in registers reach"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"sparse_inference.py: {error}", file=sys.stderr)
        sys.exit(2)
