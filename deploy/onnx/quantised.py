"""Quantised tensors: QuantizeLinear rounds to a grid, and DequantizeLinear reads the numbers as they are meant.

In a Graph every tensor holds what is meant, in float32; `Node.grid` says which values it may have.
"""

import numpy as np

from .bounds import title
from .graph import Affine, Grid


def _numbers(reader, node, usual) -> tuple[Grid, np.dtype]:
    """What a quantised tensor's values may be, and the type of its numbers: `usual` where no zero point tells it.

    ValueError unless it has 8 bits and one scale, of which float32 holds 256 and the inverse.
    """
    scale, zero = reader.constant(node, 1), reader.constant(node, 2, np.zeros((), usual))
    if (scale.dtype, scale.size, zero.size) != (np.float32, 1, 1) or zero.dtype not in (np.uint8, np.int8):
        kinds = f"{scale.size} scales of {scale.dtype} and numbers of {zero.dtype}"
        raise ValueError(f"{title(node)} has {kinds}: one scale of float32, and uint8 or int8, are supported")
    scale, limits = float(scale.reshape(())), np.finfo(np.float32)
    if not limits.tiny <= scale <= limits.max / 256:
        raise ValueError(f"{title(node)} has a scale of {scale}: it must be positive, and not extreme")
    return Grid(scale, int(zero.reshape(())) + (128 if zero.dtype == np.int8 else 0)), zero.dtype


def read_quantize(reader, node) -> None:
    from onnx import helper

    kind = reader.attributes(node).get("output_dtype")
    numbers = _numbers(reader, node, helper.tensor_dtype_to_np_dtype(kind) if kind else np.uint8)
    reader.add(Affine, node, node.input[:1], reader.shape(node.input[0]), grid=numbers[0])
    reader.quantised[node.output[0]] = numbers


def read_dequantize(reader, node) -> None:
    made = reader.quantised.get(node.input[0])
    if made is None or made != _numbers(reader, node, made[1]):
        raise ValueError(f"{title(node)} reads other numbers than a QuantizeLinear with its scale and zero point makes")
    reader.alias[node.output[0]] = reader.tensor(node.input[0])


def weight_scale(reader, node) -> np.ndarray | None:
    """Of constants that DequantizeLinear makes, int8 without a zero point: one scale, or one for each of axis 0.

    None where others made them. ValueError for a scale that is no number.
    """
    scale, numbers = reader.constant(node, 1), reader.constants[node.input[0]]
    if not np.isfinite(scale).all():
        raise ValueError(f"{title(node)} has a scale that is not a number")
    per_row = scale.ndim == 1 and numbers.ndim and reader.attributes(node).get("axis", 1) % numbers.ndim == 0
    symmetric = numbers.dtype == np.int8 and not np.any(reader.constant(node, 2, 0))
    return scale if symmetric and (scale.size == 1 or per_row) else None
