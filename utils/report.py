"""What a run reports: `summary.md`, tables and the figure, all drawn from `summary.json` and `deploy.json`."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from utils.count import Cost
from utils.files import atomic, save_json, save_text
from utils.kept import Kept

STAGES = {"dense": "dense", "pruned": "pruned, before training", "repaired": "repaired, before training"}
STAGES |= {"tuned": "after training"}
RUNTIMES = {
    "onnxruntime_dense": "ONNX Runtime, dense",
    "tvm_dense": "TVM, dense",
    "tvm_sparse": "TVM, block-sparse",
}
# What speaks of one finished network in job_dir; `shapes.png` is drawn by stripe-wise pruning.
REPORTS = ("summary.json", "summary.md", "summary.png", "shapes.png", "report.html")
REPORTS += ("model.onnx", "inputs.npy", "deploy")
Rows = list[list[str]]


def screen(quiet: bool = False) -> Console:
    """Where lines and tables go: as wide as the terminal, or wide where there is none."""
    settings = {"soft_wrap": True, "highlight": False, "markup": False, "quiet": quiet}
    console = Console(**settings)
    return console if console.is_terminal else Console(**settings, width=160)


def save_summary(job_dir: Path, facts: dict, costs: dict[str, Cost], kept: dict[str, Kept], fixed: dict[str, str]):
    """Write `summary.json`.

    Args:
        facts: arch, method, data_set, accuracy by stage, totals, ...
        costs: of every layer of the finished network.
        kept: what `Method.finish` returned.
        fixed: layer name -> why its blocks are not consecutive rows of the ONNX file.
    """
    layers = []
    for name, cost in costs.items():
        own = kept[name].to_json() if name in kept else {}
        notes = [own.get("note"), name in fixed and f"blocks not consecutive in ONNX: order fixed by {fixed[name]}"]
        got = {"sparsity": 1 - cost.density, "macs": cost.macs, "macs_kept": cost.macs_kept}
        got |= {"parameters": cost.parameters, "parameters_kept": cost.parameters - cost.zeros}
        got |= {"left": list(cost.left)} if cost.left else {}
        layers.append({"name": name, "shape": list(cost.shape), **own, **got, "note": "; ".join(filter(None, notes))})
    save_json(job_dir / "summary.json", facts | {"layers": layers})


def read(job_dir: Path) -> dict:
    """What stands in `summary.json` of `job_dir`; nothing if there is none."""
    path = job_dir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def latency_of(job_dir: Path, summary: dict) -> dict | None:
    """The content of `deploy/deploy.json`, if that library was made from the export that the summary speaks of.

    The digest of the ONNX file says so: one of another network, or of an earlier export, is left out.
    """
    deploy = job_dir / "deploy" / "deploy.json"
    latency = json.loads(deploy.read_text()) if deploy.exists() else {}
    made_from_it = summary.get("onnx_sha256") and latency.get("sha256") == summary["onnx_sha256"]
    timed_beside_its_peers = set(RUNTIMES) <= set(latency.get("latency_ms", ()))  # on this computer
    return latency if made_from_it and timed_beside_its_peers else None


def write(job_dir: Path, console: Console) -> None:
    """Write `summary.md` and `summary.png` of `job_dir` from its `summary.json` and, if there, `deploy/deploy.json`."""
    summary = read(job_dir)
    latency = latency_of(job_dir, summary)
    head, layers = overview(summary, latency), layer_rows(summary)
    title = f"{summary['arch']} on {summary['data_set']}: {summary['method']}"
    missed = "".join(f"**Not reached:** {sentence}\n\n" for sentence in summary.get("not_reached", ()))
    text = f"# {title}\n\n{missed}{markdown(head)}\n## Layers\n\n{markdown(layers)}"
    save_text(job_dir / "summary.md", text)
    show(head, title, console)
    draw(summary, latency, job_dir / "summary.png")
    console.print(f"written: {job_dir}/summary.md, summary.png")


def show_shortfalls(sentences: list[str], console: Console) -> None:
    """Say last and loud what a run was asked for and has not reached."""
    for sentence in sentences:
        console.print(f"NOT REACHED: {sentence}", style="bold red")


def overview(summary: dict, latency: dict | None) -> Rows:
    """The few rows that matter; the first is the header."""
    totals, rows = summary["totals"], [["", "value", ""]]
    for stage, label in STAGES.items():
        figures = summary["accuracy"].get(stage)
        if figures:
            rows.append([f"top-1, {label}", f"{figures['top1']:.2f} %", f"top-5 {figures['top5']:.2f} %"])
    rows.append(["sparsity of weights", f"{100 * totals['sparsity']:.1f} %", "of convolutions and linear layers"])
    for key, label in (("macs", "multiply-adds"), ("parameters", "parameters")):
        kept, total = totals[f"{key}_kept"], totals[key]
        rows.append([label, f"{kept / 1e6:.2f} M", f"of {total / 1e6:.2f} M ({100 * kept / total:.1f} %)"])
    if latency:
        dense = latency["latency_ms"]["onnxruntime_dense"]["median"]
        threads = f"{latency['threads']} thread{'s' * (latency['threads'] > 1)}, batch {latency['batch']}"
        for runtime, label in runtimes(latency).items():
            median = latency["latency_ms"][runtime]["median"]
            rows.append([f"latency, {label}", f"{median:.3f} ms", f"{dense / median:.2f} x ({threads})"])
        error = latency["max_relative_error"]
        other = " to the quantised network's" if latency.get("quantised") else ""
        rows.append(["library against the network", f"{error:.1e}", f"largest relative difference of outputs{other}"])
    return rows


def runtimes(latency: dict) -> dict[str, str]:
    """RUNTIMES, with the type of the library where it is another one than ONNX Runtime's."""
    dtype = latency.get("dtype", "float32")
    named = {name: label.replace("TVM", f"TVM in {dtype}") for name, label in RUNTIMES.items()}
    return RUNTIMES if dtype == "float32" else named


def layer_rows(summary: dict) -> Rows:
    """One row a convolution or linear layer, in the order of computation; the first row is the header."""
    header = ["layer", "shape", "pattern", "rate asked", "got", "multiply-adds kept", "parameters kept", "note"]
    rows = [header]
    for layer in summary["layers"]:
        rows.append(
            [
                layer["name"],
                " -> ".join("x".join(map(str, layer[key])) for key in ("shape", "left") if key in layer),
                layer.get("pattern", "dense"),
                f"{100 * layer['rate']:.1f} %" if "rate" in layer else "",
                f"{100 * layer['sparsity']:.1f} %",
                f"{layer['macs_kept']:,} of {layer['macs']:,}",
                f"{layer['parameters_kept']:,} of {layer['parameters']:,}",
                "; ".join(filter(None, [layer.get("note"), kept_weight(layer), left_error(layer)])),
            ]
        )
    return rows


def kept_weight(layer: dict) -> str:
    """How much of a rearranged layer's L1 norm stays, by the order in which its filters form blocks."""
    shares = ", ".join(f"{order} {100 * share:.1f} %" for order, share in layer.get("kept_l1", {}).items())
    return f"L1 kept: {shares}" if shares else ""


def left_error(layer: dict) -> str:
    """What a repair has left of the variance of the layer's outputs."""
    return f"error after repair {100 * layer['error']:.1f} %" if "error" in layer else ""


def markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def show(rows: Rows, title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, header in enumerate(rows[0]):
        table.add_column(header, justify="right" if number == 1 else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def draw(summary: dict, latency: dict | None, path: Path) -> None:
    """A figure: accuracy by stage, latency by runtime if measured, and what every layer kept."""
    from matplotlib.figure import Figure

    blue, orange, grey = "#3b6ea5", "#e08a3c", "#b8bec6"
    narrow = any("left" in layer for layer in summary["layers"])
    figure = Figure(figsize=(11, 9 if narrow else 6.2), layout="constrained")
    grid = figure.add_gridspec(2 + narrow, 2, height_ratios=(1, *[1.15] * (1 + narrow)))
    figure.suptitle(f"{summary['arch']} on {summary['data_set']}: {summary['method']}")

    accuracy = figure.add_subplot(grid[0, 0])
    stages = {label: summary["accuracy"][stage] for stage, label in STAGES.items() if summary["accuracy"].get(stage)}
    bars = accuracy.barh(list(stages), [figures["top1"] for figures in stages.values()], color=blue, height=0.6)
    accuracy.bar_label(bars, fmt="%.2f", padding=3)
    accuracy.set(title="accuracy", xlabel="top-1, %", xlim=(0, 112))

    side = figure.add_subplot(grid[0, 1])
    if latency:
        medians = [latency["latency_ms"][runtime]["median"] for runtime in RUNTIMES]
        bars = side.barh(list(runtimes(latency).values()), medians, color=[grey, grey, orange], height=0.6)
        side.bar_label(bars, fmt="%.3f", padding=3)
        side.set(title="latency of one batch", xlabel=f"ms, median, {latency['threads']} thread(s)")
        side.set_xlim(0, 1.2 * max(medians))
    else:
        kinds = {"multiply-adds": "macs", "parameters": "parameters"}
        totals = summary["totals"]
        kept = [100 * totals[f"{key}_kept"] / totals[key] for key in kinds.values()]
        bars = side.barh(list(kinds), kept, color=orange, height=0.5)
        side.bar_label(bars, fmt="%.1f", padding=3)
        side.set(title="kept", xlabel="%", xlim=(0, 112))
    for axes in (accuracy, side):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)

    macs = [(layer["macs"] / 1e6, layer["macs_kept"] / 1e6) for layer in summary["layers"]]
    beside(figure.add_subplot(grid[1, :]), macs, "multiply-adds by layer", "million")
    if narrow:
        widths = [(layer["shape"][0], layer.get("left", layer["shape"])[0]) for layer in summary["layers"]]
        beside(figure.add_subplot(grid[2, :]), widths, "width by layer", "output channels")
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=120)


def beside(axes, pairs: list[tuple[float, float]], title: str, unit: str) -> None:
    """Bars of (dense, kept), one in front of the other, for every layer."""
    for values, colour, label in zip(zip(*pairs, strict=True), ("#b8bec6", "#3b6ea5"), ("dense", "kept"), strict=True):
        axes.bar(range(len(values)), values, color=colour, label=label)
    axes.set(title=title, xlabel="layer, in order of computation", ylabel=unit)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
