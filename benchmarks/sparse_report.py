"""Tables of `benchmarks/sparse_inference.py`, from what it measured; an entry is described in `sparse_points.py`."""

import re
from pathlib import Path

from benchmarks.sparse_figures import draw, draw_accuracy
from benchmarks.sparse_points import (
    COMPILE_TARGET,
    DENSE,
    KNOWN,
    MEMORY_TARGET,
    POINTS,
    Point,
    bound,
    builds,
    goal,
    ratio,
    title,
    told,
    type_of,
)
from deploy.peers import PEERS
from utils import machine
from utils.files import save_text
from utils.report import markdown


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


def ratio_table(entries: list[dict]) -> list[list[str]]:
    """A row a network, number of threads and type, a column a point that has targets: ratio / target."""
    columns = [DENSE, *POINTS]
    table = [["network", "threads", "type", *(point.blocks for point in columns)]]
    for entry in entries:
        for dtype in dict.fromkeys(point.dtype for point in builds(entry)):
            row = [title(entry), str(entry["threads"]), dtype]
            for point in (column._replace(dtype=dtype) for column in columns):
                build, asked = builds(entry).get(point), goal(entry, point)
                reached = told(build and ratio(entry, build["ms"], dtype), ".2f")
                row.append(f"{reached} / {asked:g}" if reached and asked else reached)
            table.append(row)
    return table


def speed_table(entries: list[dict]) -> list[list[str]]:
    """All builds and peers; ratios to the fastest float32 peer, and to the fastest of the same type with its target."""
    table = [["network", "threads", "build", "type", "median ms", "p10 ms", "ratio to float32", "ratio"]]
    table[0] += ["target", "compute bound"]
    for entry in entries:
        head = [title(entry), str(entry["threads"])]
        names = entry["peers"].items()
        rows = [(f"{PEERS[name].title}, dense", type_of(entry, name), times, "", "") for name, times in names]
        for point, build in builds(entry).items():
            asked, most = told(goal(entry, point), "g"), told(bound(entry, point, build), ".1f")
            rows.append((f"ours, {point.blocks}", point.dtype, build["ms"], asked, most))
            others = build.get("peers", {}).items()
            rows += [(f"{PEERS[name].title}, {point.blocks}", "float32", times, "", "") for name, times in others]
        for name, dtype, times, asked, most in rows:
            numbers = [f"{times['median']:.3f}", f"{times['p10']:.3f}", told(ratio(entry, times), ".2f")]
            table.append([*head, name, dtype, *numbers, told(ratio(entry, times, dtype), ".2f"), asked, most])
    return table


def absent(entries: list[dict]) -> str:
    """A sentence on peers that were not timed, if there are any."""
    facts = {name: fact for entry in entries for name, fact in entry.get("peer_facts", {}).items() if "absent" in fact}
    missing = [f"{PEERS[name].title} ({fact['absent']})" for name, fact in facts.items()]
    ours = {dtype: why for entry in entries for dtype, why in entry.get("absent", {}).items()}
    missing += [f"ours in {dtype} ({why})" for dtype, why in ours.items()]
    return f"Not timed everywhere: {'; '.join(missing)}.\n\n" if missing else ""


def cost_table(entries: list[dict]) -> list[list[str]]:
    """Equality, seconds of compilation, start-up and memory."""
    rows = [["network", "threads", "build", "error", "top-1 agreement", "compiled in", "target", "loaded in"]]
    rows[0] += ["memory", "at most"]
    for entry in entries:
        head = [title(entry), str(entry["threads"])]
        for point, build in builds(entry).items():
            start = build["start_up"]
            most = MEMORY_TARGET * (build["weight_bytes"] + build["activation_bytes"]) / 2**20
            cells = [f"{build['error']:.0e}", f"{build['top1']:.0%}", f"{build['compile_s']:.1f} s"]
            cells += [f"{COMPILE_TARGET.get(entry['network'], 20)} s"]
            cells += [f"{start['load_ms']:.0f} ms", f"{start['peak_mib']:.1f} MiB"] if start else ["", "unknown"]
            rows.append([*head, point.label, *cells, f"{most:.1f} MiB"])
    return rows


def text(entries: list[dict], accuracy: dict[Point, float]) -> str:
    return f"""# Block-sparse inference

Batch 1. Ratio: how many times as fast as the fastest runtime of others on the dense network in the same type, by
medians: in float32 ONNX Runtime, OpenVINO with its latency hint and MNN, in bfloat16 OpenVINO as installed where it
chooses that, in int8 ONNX Runtime and OpenVINO. All builds and peers take turns in one process, {entries[0]["runs"]}
calls each in blocks of 25 after a pause, with the same number of threads. Weights are random. int8 files are made by
ONNX Runtime's quantiser with random pictures.

{absent(entries)}## Ratio / target

{markdown(ratio_table(entries))}
Where a target is missed: [the time of every kernel](sparse_layers.md), [what bounds it](sparse_limits.md).

![latency against sparsity](sparse_inference.png)

## Every build

Compute bound: the ratio of a build that does the arithmetic on its kept weights at the processor's peak, which was
measured as float32 multiply-adds in registers, times two in bfloat16 and four in int8: as many products as a dot
product adds up in a lane.

{markdown(speed_table(entries))}{accuracy_text(entries, accuracy)}
## Equality, compilation, memory

Error: largest difference to ONNX Runtime's outputs on the same pruned network, in float32 or, for int8, quantised,
relative to the largest output. Memory:
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
                cells = [f"{accuracy[point]:.2f}", f"{build['ms']['median']:.3f}", f"{ratio(entry, build['ms']):.2f}"]
                rows.append([str(entry["threads"]), point.label, *cells])
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
    alike: dict[str, list[str]] = {}
    for entry in entries:
        where = entry["machine"]
        tunables = f"; GLIBC_TUNABLES={where['tunables']}" if where["tunables"] else ""
        how = f"`{entry['command']}`, {machine.line(where)}{tunables}"
        what = f"{entry['network']} with {entry['threads']} thread(s) ({entry['date']}, {entry['peak_gflops']} GFLOP/s)"
        alike.setdefault(how, []).append(what)
    return "".join(f"- {', '.join(what)}: {how}\n" for how, what in alike.items())
