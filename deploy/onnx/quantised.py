"""Quantised tensors: QuantizeLinear rounds to a grid, and DequantizeLinear reads the numbers as they are meant.

In a Graph every tensor holds what is meant, in float32; `Node.grid` says which values it may have.
"""

import numpy as np

from .bounds import title
from .graph import Affine, Grid


def _grid(reader, node) -> Grid:
    """What a quantised tensor's values may be. ValueError unless it has one scale and 8 bits."""
    scale, zero = reader.constant(node, 1), reader.constant(node, 2)
    zero = np.zeros((), np.uint8) if zero is None else zero
    if scale.size != 1 or zero.dtype not in (np.uint8, np.int8):
        kinds = f"{scale.size} scales and numbers of {zero.dtype}"
        raise ValueError(f"{title(node)} has {kinds}: one scale, and uint8 or int8, are supported")
    if not 0 < scale.reshape(()) < np.inf:
        raise ValueError(f"{title(node)} has a scale of {scale.reshape(())}: it must be above 0 and finite")
    shift = 128 if zero.dtype == np.int8 else 0
    return Grid(float(scale.reshape(())), int(zero.reshape(())) + shift)


def read_quantize(reader, node) -> None:
    grid = _grid(reader, node)
    reader.add(Affine, node, node.input[:1], reader.shape(node.input[0]), grid=grid)
    reader.quantised[node.output[0]] = grid


def read_dequantize(reader, node) -> None:
    if reader.quantised.get(node.input[0]) != _grid(reader, node):
        raise ValueError(f"{title(node)} reads other numbers than a QuantizeLinear with its scale and zero point makes")
    reader.alias[node.output[0]] = reader.tensor(node.input[0])
