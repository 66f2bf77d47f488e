"""Tables and figures of `benchmarks/sparse_inference.py`, from what it measured.

An entry is a network at an image size with a number of threads: `peers` (milliseconds of each on the dense network,
median and p10), `peer_facts` (the type that each computes in, or why it is absent), `builds` (by point: our
milliseconds, what was proven and counted, and `peers` that make use of zero blocks), `peak_gflops`, and how it was
measured.
"""

import re
from pathlib import Path
from typing import NamedTuple

from deploy.peers import PEERS
from utils import machine
from utils.files import atomic, save_text
from utils.report import markdown


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
# Times as fast as the fastest dense peer in float32, at POINTS.
TARGETS = {
    "mobilenet_v1": (1.5, 1.7, 1.9, 2.8, 3.3, 5.5),
    "mobilenet_v2": (1.4, 1.6, 1.7, 2.3, 2.6, 3.5),
    "mobilenet_v3_large": (1.4, 1.6, 1.7, 2.2, 2.4, 3.0),
    "resnet50": (1.5, 1.75, 1.9, 3.1, 3.5, 6.0),
}
DENSE_TARGET, MEMORY_TARGET = 0.97, 1.3
COMPILE_TARGET = {"resnet50": 60}  # seconds; 20 for all others
COLOURS = {1: "#8c564b", 2: "#9467bd", 4: "#1f77b4", 8: "#17becf", 16: "#2ca02c", 32: "#ff7f0e"}  # by N
PEER_COLOURS = dict(zip(PEERS, ("#777777", "#bb4444", "#bb44bb", "#44aa44", "#222222", "#661111"), strict=True))
KNOWN = "resnet20"  # whose accuracy at these points is in results/cifar10_1xn.md
KNOWN_POINTS = [Point(N, rate) for rate in (50, 75) for N in (2, 4, 8, 16)]


def write(entries: list[dict], folder: Path) -> None:
    """The report and its figures."""
    accuracy = known_accuracy(Path(__file__).parent / "results" / "cifar10_1xn.md")
    save_text(folder / "sparse_inference.md", text(entries, accuracy))
    draw(entries, folder / "sparse_inference.png")
    if known(entries, accuracy):
        draw_accuracy(known(entries, accuracy), accuracy, folder / "sparse_accuracy.png")


def known_accuracy(report: Path) -> dict[Point, float]:
    """Mean top-1 of the network `KNOWN`, from the report that another benchmark wrote."""
    found = {}
    for line in report.read_text().splitlines() if report.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        row = re.fullmatch(r"dense|1x(\d+) at (\d+) %", cells[0])
        if row and re.fullmatch(r"[+-][\d.]+", cells[-1]):  # against dense; latency tables end with a ratio
            found[Point(int(row[1] or 0), int(row[2] or 0))] = float(cells[-2])
    return found


def known(entries: list[dict], accuracy: dict[Point, float]) -> list[dict]:
    """The entries whose accuracy is known."""
    there = (entry for entry in entries if entry["network"] == KNOWN and entry["image_size"] == 32)
    return [entry for entry in there if builds(entry).keys() & accuracy.keys() - {DENSE}]


def fastest(entry: dict) -> float:
    """Median milliseconds of the fastest peer in float32."""
    return min(times["median"] for name, times in entry["peers"].items() if PEERS[name].dtype == "float32")


def bound(entry: dict, build: dict) -> float:
    """How many times as fast as the fastest peer in float32 a build would be at the peak of all its cores."""
    return fastest(entry) * entry["peak_gflops"] / build["mflop"]


def ratio(entry: dict, times: dict) -> float:
    return fastest(entry) / times["median"]


def goal(entry: dict, point: Point) -> float | None:
    targets = TARGETS.get(entry["network"], ()) if entry["image_size"] == 224 else ()
    return ({DENSE: DENSE_TARGET} | dict(zip(POINTS, targets, strict=False))).get(point)


def missed(entry: dict) -> list[Point]:
    """The builds that are slower than their target, as the table rounds."""
    asked = {point: (goal(entry, point), build) for point, build in builds(entry).items()}
    return [point for point, (least, build) in asked.items() if least and round(ratio(entry, build["ms"]), 2) < least]


def builds(entry: dict) -> dict[Point, dict]:
    return {Point.parse(point): build for point, build in entry["builds"].items()}


def ratio_table(entries: list[dict]) -> list[list[str]]:
    """A row a network and number of threads, a column a point that has targets: ratio / target."""
    columns = [DENSE, *POINTS]
    table = [["network", "threads", *(point.label for point in columns)]]
    for entry in entries:
        row = [title(entry), str(entry["threads"])]
        for point in columns:
            build, asked = builds(entry).get(point), goal(entry, point)
            told = f"{ratio(entry, build['ms']):.2f}" if build else ""
            row.append(f"{told} / {asked:g}" if told and asked else told)
        table.append(row)
    return table


def title(entry: dict) -> str:
    return f"{entry['network']}, {entry['image_size']}"


def speed_table(entries: list[dict]) -> list[list[str]]:
    table = [["network", "threads", "build", "median ms", "p10 ms", "ratio", "target", "compute bound"]]
    for entry in entries:
        head = [title(entry), str(entry["threads"])]
        rows = [(peer_title(entry, name), times, "", "") for name, times in entry["peers"].items()]
        for point, build in builds(entry).items():
            asked = goal(entry, point)
            most = f"{bound(entry, build):.1f}"
            rows.append((f"ours, {point.label}", build["ms"], f"{asked:g}" if asked else "", most))
            others = build.get("peers", {}).items()
            rows += [(f"{PEERS[name].title}, {point.label}", times, "", "") for name, times in others]
        for name, times, asked, most in rows:
            told = [f"{times['median']:.3f}", f"{times['p10']:.3f}", f"{ratio(entry, times):.2f}"]
            table.append([*head, name, *told, asked, most])
    return table


def peer_title(entry: dict, name: str) -> str:
    """Its name, and its type where it has chosen that itself."""
    dtype = entry.get("peer_facts", {}).get(name, {}).get("dtype", "")
    return f"{PEERS[name].title}{f' ({dtype})' if PEERS[name].dtype == 'own choice' else ''}, dense"


def absent(entries: list[dict]) -> str:
    """A sentence on peers that were not timed, if there are any."""
    facts = {name: fact for entry in entries for name, fact in entry.get("peer_facts", {}).items() if "absent" in fact}
    told = [f"{PEERS[name].title} ({fact['absent']})" for name, fact in facts.items()]
    return f"Not timed everywhere: {'; '.join(told)}.\n\n" if told else ""


def cost_table(entries: list[dict]) -> list[list[str]]:
    """Equality, seconds of compilation, start-up and memory."""
    rows = [["network", "threads", "build", "error", "top-1 agreement", "compiled in", "target", "loaded in"]]
    rows[0] += ["memory", "at most"]
    for entry in entries:
        head = [title(entry), str(entry["threads"])]
        for point, build in builds(entry).items():
            start = build["start_up"]
            most = MEMORY_TARGET * (build["weight_bytes"] + build["activation_bytes"]) / 2**20
            told = [f"{build['error']:.0e}", f"{build['top1']:.0%}", f"{build['compile_s']:.1f} s"]
            told += [f"{COMPILE_TARGET.get(entry['network'], 20)} s"]
            told += [f"{start['load_ms']:.0f} ms", f"{start['peak_mib']:.1f} MiB"] if start else ["", "unknown"]
            rows.append([*head, point.label, *told, f"{most:.1f} MiB"])
    return rows


def text(entries: list[dict], accuracy: dict[Point, float]) -> str:
    return f"""# Block-sparse inference

Batch 1; ours in float32. Ratio: how many times as fast as the fastest runtime of others on the dense network in float32
(ONNX Runtime, OpenVINO with its latency hint, MNN), by medians. All builds and peers take turns in one process,
{entries[0]["runs"]} calls each in blocks of 25 after a pause, with the same number of threads. Weights are random.
OpenVINO as installed chooses its type; int8 is the dense network, quantised by ONNX Runtime with random pictures.

{absent(entries)}## Ratio / target

{markdown(ratio_table(entries))}
Where a target is missed: [the time of every kernel](sparse_layers.md), [what bounds it](sparse_limits.md).

![latency against sparsity](sparse_inference.png)

## Every build

Compute bound: the ratio of a build that does the arithmetic on its kept weights at the processor's peak, which was
measured as multiply-adds in registers.

{markdown(speed_table(entries))}{accuracy_text(entries, accuracy)}
## Equality, compilation, memory

Error: largest difference to ONNX Runtime's outputs on the same pruned network, relative to the largest output. Memory:
what a process grows by, at its highest, while it loads the saved library and runs it. At most: {MEMORY_TARGET} times
packed weights (`weights.bin`) and the two largest activations.

{markdown(cost_table(entries))}
## How it was measured

{provenance(entries)}"""


def accuracy_text(entries: list[dict], accuracy: dict[Point, float]) -> str:
    rows = [["threads", "build", "top-1, %", "median ms", "ratio"]]
    for entry in known(entries, accuracy):
        for point, build in builds(entry).items():
            if point in accuracy:
                told = [f"{accuracy[point]:.2f}", f"{build['ms']['median']:.3f}", f"{ratio(entry, build['ms']):.2f}"]
                rows.append([str(entry["threads"]), point.label, *told])
    if len(rows) == 1:
        return ""
    return f"""
## Accuracy against latency

{KNOWN} on CIFAR-10: accuracy of the networks trained for [1xN blocks on CIFAR-10](cifar10_1xn.md), latency of their
twins with random weights.

{markdown(rows)}
![accuracy against latency](sparse_accuracy.png)
"""


def provenance(entries: list[dict]) -> str:
    """Command, machine, versions and commit of every entry; said once where they agree."""
    told: dict[str, list[str]] = {}
    for entry in entries:
        where = entry["machine"]
        tunables = f"; GLIBC_TUNABLES={where['tunables']}" if where["tunables"] else ""
        how = f"`{entry['command']}`, {machine.line(where)}{tunables}"
        what = f"{entry['network']} with {entry['threads']} thread(s) ({entry['date']}, {entry['peak_gflops']} GFLOP/s)"
        told.setdefault(how, []).append(what)
    return "".join(f"- {', '.join(what)}: {how}\n" for how, what in told.items())


def draw(entries: list[dict], path: Path) -> None:
    """Latency against sparsity: a panel a network and number of threads, a line a block length; peers are dashed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(title(entry) for entry in entries))
    counts = sorted({entry["threads"] for entry in entries})
    figure = Figure(figsize=(3.4 * len(names), 3 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), len(names), squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)  # until an entry fills it
    for entry in entries:
        axes = panels[counts.index(entry["threads"])][names.index(title(entry))]
        times = {point: build["ms"]["median"] for point, build in builds(entry).items()}
        for N in sorted({point.N for point in times} - {0}):
            line = sorted((point.rate, ms) for point, ms in times.items() if point.N in (0, N))
            axes.plot(*zip(*line, strict=True), "o-", markersize=4, color=COLOURS.get(N), label=f"N={N}")
        dashed_peers(axes.axhline, entry)
        axes.set(title=f"{title(entry)}, {entry['threads']} thread(s)", xlabel="sparsity, %", ylabel="ms", visible=True)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    save(figure, path)


def draw_accuracy(entries: list[dict], accuracy: dict[Point, float], path: Path) -> None:
    """Top-1 against latency: a panel a number of threads, a line a block length from dense on; peers are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(entries), 3.5), layout="constrained")
    for axes, entry in zip(figure.subplots(1, len(entries), squeeze=False).flat, entries, strict=True):
        times = {point: build["ms"]["median"] for point, build in builds(entry).items() if point in accuracy}
        for N in sorted({point.N for point in times} - {0}):
            line = [(times[point], accuracy[point]) for point in sorted(times) if point.N in (0, N)]
            axes.plot(*zip(*line, strict=True), "o-", markersize=4, color=COLOURS.get(N), label=f"N={N}")
        dashed_peers(axes.axvline, entry)
        axes.set(title=f"{title(entry)}, {entry['threads']} thread(s)", xlabel="ms", ylabel="top-1, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    save(figure, path)


def dashed_peers(line, entry: dict) -> None:
    for name, times in entry["peers"].items():
        colour = PEER_COLOURS[name]
        line(times["median"], color=colour, linestyle="--", linewidth=1, label=peer_title(entry, name))


def save(figure, path: Path) -> None:
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=130)
