"""Latency of block-sparse networks beside dense ONNX Runtime, dense OpenVINO and our own dense build.

python benchmarks/sparse_inference.py --threads 1 2
python benchmarks/sparse_inference.py --layers mobilenet_v1 32 50

Weights are random, since only speed and equality are asked: every network is pruned one-shot, exported, compiled, and
proven equal to ONNX Runtime. All builds of a network take turns in one process of their own, with pauses. Interrupted,
it goes on where it was: what `results/sparse_inference.json` holds is not measured again without --again. Writes the
tables and figures of `results/sparse_inference.md`. --layers prints one network kernel by kernel instead.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import machine  # noqa: E402
from utils.files import atomic, save_json, save_text  # noqa: E402
from utils.report import markdown  # noqa: E402


class Point(NamedTuple):
    """Blocks of N rows, `rate` per cent of them pruned; written N:rate. Dense: 0:0."""

    N: int
    rate: int

    @classmethod
    def parse(cls, text: str) -> "Point":
        N, rate = map(int, text.split(":"))
        return cls(N, rate)

    def __str__(self) -> str:
        return f"{self.N}:{self.rate}"

    @property
    def label(self) -> str:
        return f"N={self.N}, {self.rate} %" if self.N else "dense"


DENSE = Point(0, 0)
POINTS = [Point(4, 50), Point(16, 50), Point(32, 50), Point(16, 75), Point(32, 75), Point(32, 90)]
# Times as fast as the fastest dense peer, at POINTS.
TARGETS = {
    "mobilenet_v1": (1.5, 1.7, 1.9, 2.8, 3.3, 5.5),
    "mobilenet_v2": (1.4, 1.6, 1.7, 2.3, 2.6, 3.5),
    "mobilenet_v3_large": (1.4, 1.6, 1.7, 2.2, 2.4, 3.0),
    "resnet50": (1.5, 1.75, 1.9, 3.1, 3.5, 6.0),
}
DENSE_TARGET, MEMORY_TARGET = 0.97, 1.3
COMPILE_TARGET = {"resnet50": 60}  # seconds; 20 for all others
PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
CIFAR = {f"resnet{depth}": 32 for depth in (20, 32, 44, 56)}  # network -> pixels a side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(TARGETS))
    parser.add_argument("--points", nargs="+", type=Point.parse, default=POINTS, help="N:per cent, as 16:50")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=200, help="timed calls of every build")
    parser.add_argument("--image_size", type=int, default=224, help="of networks that are not CIFAR's")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--cache", type=Path, default=ROOT / "experiments" / "sparse_inference", help="of ONNX files")
    parser.add_argument("--layers", nargs=3, metavar=("NETWORK", "N", "RATE"), help="kernel by kernel; 0 0 is dense")
    options = parser.parse_args()

    if options.layers:
        name, *point = options.layers
        file = exported(options, name, Point(*map(int, point)))
        for threads in options.threads:
            print(in_a_process(layers, file, threads, options.runs))
        return
    results = options.out / "sparse_inference.json"
    entries = json.loads(results.read_text()) if results.exists() else {}
    for name in options.networks:
        for threads in options.threads:
            key = f"{name} {image_size(options, name)} {threads}"
            if not options.again and covers(entries.get(key), options.points, options.runs):
                continue
            files = {str(point): exported(options, name, point) for point in [DENSE, *options.points]}
            print(f"{name}, {threads} thread(s)", flush=True)
            measured = in_a_process(measure_network, files, threads, options.runs)
            for point, file in files.items():
                measured["builds"][point]["memory"] = in_a_process(peak_memory, file, threads)
            facts = {"network": name, "image_size": image_size(options, name), "threads": threads}
            entries[key] = facts | {"runs": options.runs} | measured | circumstances()
            save_json(results, entries)
            print("\n".join(" | ".join(row) for row in speed_table([entries[key]])), flush=True)
    save_text(options.out / "sparse_inference.md", text(list(entries.values())))
    draw(list(entries.values()), options.out / "sparse_inference.png")


def image_size(options: argparse.Namespace, name: str) -> int:
    return CIFAR.get(name, options.image_size)


def covers(entry: dict | None, points: list[Point], runs: int) -> bool:
    """Whether an entry of the results holds all that is asked."""
    return bool(entry) and entry["runs"] >= runs and {str(point) for point in points} <= entry["builds"].keys()


def in_a_process(function, *arguments):
    """What `function` returns in a fresh process: threads are configured once a process, and memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def circumstances() -> dict:
    where = machine.describe() | {"tunables": os.environ.get("GLIBC_TUNABLES")}
    where["versions"] |= machine.versions(("openvino",))
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
    network, images = models.create_model(name), torch.randn(4, 3, size, size)
    method = pruning.create_method("block_l1" if point.N else "dense", N=max(1, point.N), pr_target=point.rate / 100)
    method.attach(network)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            module.momentum = 1  # one pass sets the statistics
    with torch.no_grad():
        network.train()(images)
    kept = pruning.finish(method, network, images)
    lengths = {layer: told["N"] for layer, told in kept.items() if told.get("N") and told.get("rate")}
    network, _ = pruning.proven_copy(network, lambda copy: pruning.gather_blocks(copy, lengths), images)
    export_onnx(network, images, path)


# Measured, each in a process of its own


def measure_network(files: dict[str, Path], threads: int, runs: int) -> dict:
    """Compile the network at every point, compare it with ONNX Runtime, and time all builds and both peers in turns."""
    import deploy
    from deploy import measure

    pictures = np.load(files[str(DENSE)].parent / "inputs.npy")
    shape = [1, *pictures.shape[1:]]
    runners = {
        "onnxruntime": measure.peer(files[str(DENSE)], threads),
        "openvino": measure.openvino_peer(files[str(DENSE)], threads, shape),
    }
    builds = {}
    for point, file in files.items():
        start = time.perf_counter()
        library = deploy.compile_onnx(file, threads=threads)
        seconds = time.perf_counter() - start
        error, top1 = measure.compare(library.run, measure.peer(file, threads), pictures, 1)
        builds[point] = {"compile_s": round(seconds, 2), "error": error, "top1": top1, **work(file)}
        print(f"  {Point.parse(point).label}: compiled in {seconds:.1f} s, error {error:.1e}", flush=True)
        library.save(file.parent / "deploy")
        runners[point] = library.run
    latency = measure.race(runners, pictures[:1], runs)
    for point, build in builds.items():
        build["ms"] = latency[point]
    return {"peers": {name: latency[name] for name in PEERS}, "builds": builds, "peak_gflops": peak_gflops(threads)}


def work(file: Path) -> dict:
    """Floating point operations with weights other than zero, bytes of these weights, and of the largest tensors."""
    from deploy import passes, reader

    graph = passes.simplify(reader.read_onnx(file, None))
    flops = weights = 0
    for node in graph.nodes:
        weight = getattr(node, "weight", None)
        if weight is not None:
            kept = int(np.count_nonzero(weight))
            weights += 4 * kept
            flops += 2 * kept * int(np.prod(graph.shapes[node.output][2:]))
    tensors = sorted(4 * int(np.prod(graph.shapes[name])) for name in [graph.input, *(n.output for n in graph.nodes)])
    return {"mflop": round(flops / 1e6, 3), "weight_bytes": weights, "activation_bytes": sum(tensors[-2:])}


def peak_memory(file: Path, threads: int) -> dict:
    """Bytes that loading the saved library and running it add to the process, at the highest point of each."""
    import tvm  # noqa: F401  # its own code is not counted

    import deploy

    pictures = np.load(file.parent / "inputs.npy")[:1]
    before = resident("VmRSS")
    library = deploy.load(file.parent / "deploy")
    library.run(pictures)
    loading = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    for _ in range(3):
        library.run(pictures)
    return {"load": loading - before, "run": resident("VmHWM") - before, "anonymous": resident("RssAnon")}


def resident(field: str) -> int:
    """Bytes, of Linux's account of this process."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def peak_gflops(threads: int) -> float:
    """GFLOP/s of a loop of independent multiply-adds in registers, on `threads` cores."""
    import tvm
    from tvm.script.ir_builder import tirx as T

    from deploy import emit, library, targets

    cpu, steps = targets.find_machine("native"), 100_000
    lanes, count = cpu.lanes, cpu.accumulators

    def body(x, y):
        with T.parallel(threads) as core:
            sums = T.alloc_buffer((count * lanes,), "float32", scope="local")
            factor = T.bind(emit.load(x, core * lanes, lanes))
            for r in range(count):
                emit.store(sums, r * lanes, emit.splat(0.0, lanes), lanes)
            with T.serial(steps):
                for r in range(count):
                    emit.store(sums, r * lanes, emit.load(sums, r * lanes, lanes) * factor + factor, lanes)
            for r in range(count):
                emit.store(y, (core * count + r) * lanes, emit.load(sums, r * lanes, lanes), lanes)

    buffers = [("x", threads * lanes, "float32"), ("y", threads * count * lanes, "float32")]
    function = emit.kernel(buffers, body).with_attr("global_symbol", "main")
    library.set_threads(threads)
    module = tvm.compile(tvm.IRModule({"main": function}), target=cpu.target)
    tensors = [tvm.runtime.tensor(np.full(length, 0.5, np.float32)) for _, length, _ in buffers]
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        module["main"](*tensors)
        taken.append(time.perf_counter() - start)
    return round(2 * threads * count * lanes * steps / min(taken) / 1e9, 1)


def layers(file: Path, threads: int, runs: int) -> str:
    """A table of every kernel call: median time, and for layers the rate of work on the kept weights."""
    import tvm
    from tvm import cpu, relax

    import deploy

    library = deploy.compile_onnx(file, threads=threads)
    deploy.library.set_threads(threads)
    vm, rows = relax.VirtualMachine(library.module, cpu()), iter(library.info["layers"])
    images = tvm.runtime.tensor(np.load(file.parent / "inputs.npy")[:1])
    calls, started = [], []

    def instrument(function, symbol, before, result, *arguments) -> int:
        if before:
            started.append(time.perf_counter())
        elif not symbol.startswith("vm."):
            calls.append((symbol, time.perf_counter() - started.pop()))
        return 0

    vm["main"](images)
    vm.set_instrument(instrument)
    times = []
    for _ in range(runs + 2):
        calls.clear()
        vm["main"](images)
        times.append([seconds for _, seconds in calls])
    medians, peak = np.median(times[2:], axis=0), peak_gflops(threads)
    table = [["kernel", "layer", "shape", "N", "density", "pixels", "us", "GFLOP/s", "of peak", "of all time"]]
    gemms = sum("gemm" in symbol for symbol, _ in calls) == len(library.info["layers"])
    for (symbol, _), seconds in zip(calls, medians, strict=True):
        row = next(rows) if gemms and "gemm" in symbol else None
        told = ["", "", "", "", "", f"{1e6 * seconds:.1f}", "", "", f"{seconds / medians.sum():.1%}"]
        if row:
            rate = 2 * np.prod(row["shape"]) * row["density"] * row["pixels"] / seconds / 1e9
            shape = "x".join(map(str, row["shape"]))
            told[:5] = [row["name"], shape, str(row["N"] or ""), f"{row['density']:.3f}", str(row["pixels"])]
            told[6:8] = [f"{rate:.0f}", f"{rate / peak:.0%}"]
        table.append([symbol, *told])
    total = work(file)["mflop"] / 1e3
    return (
        f"{markdown(table)}\n{threads} thread(s): {1e3 * medians.sum():.3f} ms in kernels, {total:.3f} GFLOP on kept "
        f"weights, {total / medians.sum():.0f} GFLOP/s; peak {peak} GFLOP/s, measured by multiply-adds in registers"
    )


# The report


def fastest(entry: dict) -> float:
    """Median milliseconds of the faster peer."""
    return min(times["median"] for times in entry["peers"].values())


def bound(entry: dict, build: dict) -> float:
    """How many times as fast as the faster peer a build would be at the peak of all its cores."""
    return fastest(entry) * entry["peak_gflops"] / build["mflop"]


def speed_table(entries: list[dict]) -> list[list[str]]:
    rows = [["network", "threads", "build", "median ms", "p10 ms", "ratio", "target", "compute bound"]]
    for entry in entries:
        head = [f"{entry['network']}, {entry['image_size']}", str(entry["threads"])]
        goals = dict(zip(map(str, POINTS), TARGETS.get(entry["network"], ()), strict=False)) | {"0:0": DENSE_TARGET}
        for name, times in entry["peers"].items():
            ratio = fastest(entry) / times["median"]
            rows.append([*head, PEERS[name], f"{times['median']:.3f}", f"{times['p10']:.3f}", f"{ratio:.2f}", "", ""])
        for point, build in entry["builds"].items():
            times, goal = build["ms"], goals.get(point)
            ratio = fastest(entry) / times["median"]
            told = [f"{times['median']:.3f}", f"{times['p10']:.3f}", f"{ratio:.2f}", f"{goal:g}" if goal else ""]
            rows.append([*head, f"ours, {Point.parse(point).label}", *told, f"{bound(entry, build):.1f}"])
    return rows


def cost_table(entries: list[dict]) -> list[list[str]]:
    """Equality, seconds of compilation and memory."""
    rows = [["network", "threads", "build", "error", "top-1 agreement", "compiled in", "target"]]
    rows[0] += ["memory of a run", "at most", "while loading"]
    for entry in entries:
        head = [f"{entry['network']}, {entry['image_size']}", str(entry["threads"])]
        for point, build in entry["builds"].items():
            most = MEMORY_TARGET * (build["weight_bytes"] + build["activation_bytes"])
            told = [f"{build['error']:.0e}", f"{build['top1']:.0%}", f"{build['compile_s']:.1f} s"]
            told += [f"{COMPILE_TARGET.get(entry['network'], 20)} s"]
            told += [f"{size / 1e6:.1f} MB" for size in (build["memory"]["run"], most, build["memory"]["load"])]
            rows.append([*head, Point.parse(point).label, *told])
    return rows


def text(entries: list[dict]) -> str:
    return f"""# Block-sparse inference

Batch 1, float32. Ratio: how many times as fast as the faster of dense ONNX Runtime and dense OpenVINO (latency hint,
float32), by medians. All builds and both peers take turns in one process, {entries[0]["runs"]} calls each in blocks of
25 after a pause, with the same number of threads. Compute bound: the ratio at the processor's peak, as measured by
multiply-adds in registers.

{markdown(speed_table(entries))}
![latency against sparsity](sparse_inference.png)

## Equality, compilation, memory

Error: largest difference to ONNX Runtime's outputs on the same pruned network, relative to the largest output. Memory:
what the saved library adds to a process, at its highest. At most: {MEMORY_TARGET} times kept weights and the two
largest activations.

{markdown(cost_table(entries))}
## How it was measured

{provenance(entries)}"""


def provenance(entries: list[dict]) -> str:
    """Command, machine, versions and commit of every entry; said once where they agree."""
    told: dict[str, list[str]] = {}
    for entry in entries:
        where = entry["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
        tunables = f"; GLIBC_TUNABLES={where['tunables']}" if where["tunables"] else ""
        how = f"`{entry['command']}`, {where['cpu']}, {where['cores']} cores; Python {where['python']}; {versions}"
        how += f"{tunables}; commit {where['commit']}"
        what = f"{entry['network']} with {entry['threads']} thread(s) ({entry['date']}, {entry['peak_gflops']} GFLOP/s)"
        told.setdefault(how, []).append(what)
    return "".join(f"- {', '.join(what)}: {how}\n" for how, what in told.items())


def draw(entries: list[dict], path: Path) -> None:
    """Latency against sparsity, a line a block length, a panel a network and number of threads; peers are dashed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys((entry["network"], entry["image_size"]) for entry in entries))
    counts = sorted({entry["threads"] for entry in entries})
    figure = Figure(figsize=(3.4 * len(names), 3 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), len(names), squeeze=False)
    for entry in entries:
        axes = panels[counts.index(entry["threads"])][names.index((entry["network"], entry["image_size"]))]
        builds = {Point.parse(point): build["ms"]["median"] for point, build in entry["builds"].items()}
        for N in sorted({point.N for point in builds} - {0}):
            line = sorted((point.rate, ms) for point, ms in builds.items() if point.N in (0, N))
            axes.plot(*zip(*line, strict=True), "o-", markersize=4, label=f"N={N}")
        for (name, times), colour in zip(entry["peers"].items(), ("#777777", "#bb4444"), strict=True):
            axes.axhline(times["median"], color=colour, linestyle="--", linewidth=1, label=PEERS[name])
        axes.set(title=f"{entry['network']}, {entry['threads']} thread(s)", xlabel="sparsity, %", ylabel="ms")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=8)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=130)


if __name__ == "__main__":
    main()
