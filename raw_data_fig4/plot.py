"""Draw the published curves of accuracy over pruning rate, with your own runs laid over them, as PNG and SVG.

python raw_data_fig4/plot.py experiments/*/summary.json --out experiments

A run of a published network on an image folder lies in that network's panels; any other network or data set gets two
panels of its own. Curves: `<network>_<metric>.csv` beside this file, the plot data of the 1xN paper's figure 4.
"""

import argparse
import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from utils.files import atomic  # noqa: E402

PUBLISHED = {
    ("mobilenet_v2", "imagefolder"): "MobileNet-V2, ImageNet",
    ("resnet50", "imagefolder"): "ResNet-50, ImageNet",
}
METRICS = {"top1": "top-1 accuracy, %", "top5": "top-5 accuracy, %"}
# Block lengths are an ordered scale, light to dark; the others stand out in hue, line and marker.
LINES = {
    "baseline": {"color": "#777777", "linestyle": "--", "label": "dense"},
    "weight": {"color": "black", "marker": "s"},
    "1x2": {"color": "#7ad151", "marker": "v"},
    "1x4": {"color": "#22a884", "marker": "^"},
    "1x8": {"color": "#2a788e", "marker": "o"},
    "1x16": {"color": "#414487", "marker": "D"},
    "1x32": {"color": "#440154", "marker": "P"},
    "filter": {"color": "#d55e00", "marker": "X"},
}
SINGULAR = {"dense": "baseline", "weights": "weight", "filters": "filter"}  # a method's own words -> its curve
CURVE = {"markersize": 4, "linewidth": 1.3}
MARKERS = "*hpdH<>8"  # of own runs
MIDDLE = [0.4, 0.5, 0.6]  # rates that are enlarged: the tables are of 0.5


@dataclass(frozen=True)
class Run:
    """What a `summary.json` says of one run."""

    arch: str
    data_set: str
    method: str
    pattern: str  # its published curve, if it has one
    rate: float  # the share of all weights that went
    accuracy: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="*", type=Path, metavar="summary.json", help="runs of imagenet.py")
    parser.add_argument("--out", default=Path("experiments"), type=Path, help="folder of fig4.png and fig4.svg")
    options = parser.parse_args()
    runs = [read_run(path) for path in options.summaries]
    for path in save(draw(runs), options.out):
        print(f"written: {path}")


def read_run(path: Path) -> Run:
    try:
        summary = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    try:
        name, *told = summary["method"].split(", ")
        tuned = summary["accuracy"]["tuned"]
        block = re.fullmatch(r"(1x\d+) blocks", name)
        asked = ("pr_target ", "k ", "flops_target ", "sr ")  # the axis tells what was reached
        return Run(
            arch=str(summary["arch"]),
            data_set=str(summary["data_set"]),
            method=", ".join([name, *(part for part in told if not part.startswith(asked))]),
            pattern=block[1] if block else SINGULAR.get(name, name),
            rate=float(summary["totals"]["sparsity"]),
            accuracy={metric: float(tuned[metric]) for metric in METRICS},
        )
    except KeyError as error:
        raise ValueError(f"{path}: not a summary.json of imagenet.py: {error.args[0]!r} is missing") from None
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: not a summary.json of imagenet.py") from None


def read_curves(arch: str, metric: str) -> tuple[list[float], dict[str, list[float]]]:
    """Pruning rates, and the accuracy at each by pattern."""
    with open(HERE / f"{arch}_{metric}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
    return columns.pop("pruning_rate"), columns


def draw(runs: list[Run]):
    """The figure: a row a network, a column a metric."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = list(dict.fromkeys([*PUBLISHED, *((run.arch, run.data_set) for run in runs)]))
    figure = Figure(figsize=(10, 3.9 * len(rows) + 0.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03)
    grid = figure.subplots(len(rows), len(METRICS), squeeze=False)
    styles = own_styles(runs)
    for (arch, data_set), panels in zip(rows, grid, strict=True):
        for metric, axes in zip(METRICS, panels, strict=True):
            inside = [run for run in runs if (run.arch, run.data_set) == (arch, data_set)]
            title = PUBLISHED.get((arch, data_set), f"{arch}, {data_set}")
            axes.set(title=title, xlabel="pruning rate", ylabel=METRICS[metric])
            first, last = min([0.1, *(run.rate for run in inside)]), max([0.9, *(run.rate for run in inside)])
            axes.set_xticks([tenth / 10 for tenth in range(10)])
            axes.set_xlim(first - 0.04, last + 0.04)
            axes.grid(color="#e5e5e5", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            fill(axes, arch if (arch, data_set) in PUBLISHED else None, metric, inside, styles)
    curves = [Line2D([], [], **CURVE | style) for style in LINES.values()]
    labels = [style.get("label", name) for name, style in LINES.items()]
    figure.legend(curves, labels, loc="outside upper center", ncols=len(LINES), frameon=False)
    if runs:
        points = [Line2D([], [], **style) for style in styles.values()]
        labels = [f"ours: {method}" for method in styles]
        figure.legend(points, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def fill(axes, arch: str | None, metric: str, runs: list[Run], styles: dict[str, dict]) -> None:
    """Published curves, if any, with the middle rates enlarged, and the runs over them."""
    places = [axes]
    if arch:
        rates, curves = read_curves(arch, metric)
        zoom = axes.inset_axes([0.09, 0.09, 0.5, 0.5])
        zoom.tick_params(labelsize=8)
        places.append(zoom)
        for place in places:
            for name, style in LINES.items():
                place.plot(rates, curves[name], **CURVE | style)
        middle = [values[rates.index(rate)] for name, values in curves.items() if name != "filter" for rate in MIDDLE]
        space = 0.06 * (max(middle) - min(middle))
        zoom.set(xlim=(MIDDLE[0] - 0.02, MIDDLE[-1] + 0.02), ylim=(min(middle) - space, max(middle) + space))
        zoom.set_xticks(MIDDLE)
        axes.indicate_inset_zoom(zoom, edgecolor="#777777")
    for place in places:
        for run in runs:
            place.plot(run.rate, run.accuracy[metric], **styles[run.method])


def own_styles(runs: list[Run]) -> dict[str, dict]:
    """A marker for every method, in the colour of its published curve."""
    methods = {run.method: run.pattern for run in runs}
    return {
        method: {
            "color": LINES.get(pattern, {}).get("color", "#cc79a7"),
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 10,
            "markeredgecolor": "black",
            "linestyle": "none",
            "zorder": 5,
        }
        for place, (method, pattern) in enumerate(methods.items())
    }


def save(figure, folder: Path) -> list[Path]:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fig4"}):  # the same figure is the same file
        for kind in ("png", "svg"):
            with atomic(folder / f"fig4.{kind}") as file:
                figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return [folder / "fig4.png", folder / "fig4.svg"]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"plot.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
