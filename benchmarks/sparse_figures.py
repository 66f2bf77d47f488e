"""The figures of `benchmarks/sparse_inference.py`: latency against sparsity, and accuracy against latency."""

from pathlib import Path

from benchmarks.sparse_points import Point, builds, peer_title, title
from deploy.peers import PEERS
from utils.files import atomic

COLOURS = {1: "#8c564b", 2: "#9467bd", 4: "#1f77b4", 8: "#17becf", 16: "#2ca02c", 32: "#ff7f0e"}  # by N
MARKERS = {"float32": "o", "bfloat16": "s", "int8": "^"}
PEER_COLOURS = dict(zip(PEERS, ("#777777", "#bb4444", "#bb44bb", "#44aa44", "#222222", "#661111"), strict=True))


def draw(entries: list[dict], path: Path) -> None:
    """Latency against sparsity: a panel a network and number of threads, a line a block length; peers are dashed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(title(entry) for entry in entries))
    counts = sorted({entry["threads"] for entry in entries})
    figure = Figure(figsize=(3.4 * len(names), 4.2 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), len(names), squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)  # until an entry fills it
    for entry in entries:
        axes = panels[counts.index(entry["threads"])][names.index(title(entry))]
        times = {point: build["ms"]["median"] for point, build in builds(entry).items()}
        for dtype, N in sorted({(point.dtype, point.N) for point in times if point.N}):
            mine = {point: ms for point, ms in times.items() if point.dtype == dtype and point.N in (0, N)}
            line, name = sorted((point.rate, ms) for point, ms in mine.items()), Point(N, 0, dtype).label
            style = {"marker": MARKERS[dtype], "markersize": 4, "color": COLOURS.get(N)}
            axes.plot(*zip(*line, strict=True), **style, label=name.replace(", 0 %", ""))
        dashed_peers(axes.axhline, entry)
        axes.set(title=f"{title(entry)}, {entry['threads']} thread(s)", xlabel="sparsity, %", ylabel="ms", visible=True)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))  # clear of the lines
    save(figure, path)


def draw_accuracy(entries: list[dict], accuracy: dict[Point, float], path: Path) -> None:
    """Top-1 against latency: a panel a number of threads, a line a block length from dense on; peers are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(entries), 4.7), layout="constrained")
    for axes, entry in zip(figure.subplots(1, len(entries), squeeze=False).flat, entries, strict=True):
        times = {point: build["ms"]["median"] for point, build in builds(entry).items() if point in accuracy}
        for N in sorted({point.N for point in times} - {0}):
            line = [(times[point], accuracy[point]) for point in sorted(times) if point.N in (0, N)]
            axes.plot(*zip(*line, strict=True), "o-", markersize=4, color=COLOURS.get(N), label=f"N={N}")
        dashed_peers(axes.axvline, entry)
        axes.set(title=f"{title(entry)}, {entry['threads']} thread(s)", xlabel="ms", ylabel="top-1, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    save(figure, path)


def dashed_peers(line, entry: dict) -> None:
    for name, times in entry["peers"].items():
        colour = PEER_COLOURS[name]
        line(times["median"], color=colour, linestyle="--", linewidth=1, label=peer_title(entry, name))


def save(figure, path: Path) -> None:
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=130)
