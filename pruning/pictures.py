"""Pictures that belong to a method: what `Method.draw` writes beside the report."""

from pathlib import Path

from utils.files import atomic
from utils.kept import Kept


def draw_shapes(kept: dict[str, Kept], title: str, path: Path) -> list[str]:
    """For every layer with kernels larger than 1x1, the share of its filters that keeps each position.

    Returns:
        the names of the files: none if no layer has such kernels.
    """
    from matplotlib.figure import Figure

    layers = {name: layer for name, layer in kept.items() if layer.positions and len(layer.positions) > 1}
    if not layers:
        return []
    columns = min(10, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(1.1 * columns + 0.8, 1.3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (name, layer) in zip(panels.flat, layers.items(), strict=False):
        shares = [[count / layer.filters for count in row] for row in layer.positions]
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for y, row in enumerate(layer.positions):
            for x, count in enumerate(row):
                colour = "white" if 2 * count > layer.filters else "black"
                axes.text(x, y, count, ha="center", va="center", size=6, color=colour)
        axes.set_title(name, size=6)
    figure.suptitle(title, size=9)
    figure.colorbar(picture, ax=panels, shrink=0.6, label="share of the dense layer's filters")
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return [path.name]
