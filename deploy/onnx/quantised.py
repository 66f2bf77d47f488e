"""Quantised tensors: QuantizeLinear rounds to a grid, and DequantizeLinear reads the numbers as they are meant.

In a Graph every tensor holds what is meant, in float32; `Node.grid` says which values it may have.
"""

from dataclasses import dataclass

import numpy as np

from .bounds import title
from .graph import Affine, Grid


@dataclass(frozen=True)
class Numbers:
    """What a quantised tensor holds: (q - zero) * scale for q from 0 to 255, those of int8 being shifted by 128."""

    scales: tuple[float, ...]  # one, or one a channel
    zeros: tuple[int, ...]
    dtype: np.dtype


def _numbers(reader, node, usual) -> Numbers:
    """What a node says of the quantised tensor; its type is `usual` where no zero point tells it.

    ValueError unless it has 8 bits, and one scale, or one a channel, of which float32 holds 256 and the inverse.
    """
    scale = reader.constant(node, 1)
    zero = reader.constant(node, 2, np.zeros(scale.shape, usual))
    counts, axis = {1}, reader.attributes(node).get("axis", 1)
    shape = reader.shape(node.input[0])
    if scale.ndim == 1 and axis % len(shape) == 1:
        counts.add(shape[1])
    eight = zero.dtype in (np.uint8, np.int8)
    if scale.dtype != np.float32 or zero.size != scale.size or scale.size not in counts or not eight:
        kinds = f"{scale.size} scales of {scale.dtype} and numbers of {zero.dtype}"
        raise ValueError(f"{title(node)} has {kinds}: float32, one or one a channel, and uint8 or int8 are supported")
    limits = np.finfo(np.float32)
    wrong = scale[~((scale >= limits.tiny) & (scale <= limits.max / 256))]
    if wrong.size:
        raise ValueError(f"{title(node)} has a scale of {wrong[0]}: it must be positive, and not extreme")
    zeros = zero.reshape(-1).astype(int) + (128 if zero.dtype == np.int8 else 0)
    return Numbers(tuple(scale.reshape(-1).tolist()), tuple(zeros.tolist()), zero.dtype)


def _of_channels(numbers: Numbers) -> tuple[np.ndarray, np.ndarray | None]:
    """(scales, zero points beyond the first one) of a tensor with a scale a channel."""
    beyond = np.subtract(numbers.zeros, numbers.zeros[0])
    return np.float32(numbers.scales), beyond.astype(np.float32) if beyond.any() else None


def read_quantize(reader, node) -> None:
    from onnx import helper

    kind = reader.attributes(node).get("output_dtype")
    numbers = _numbers(reader, node, helper.tensor_dtype_to_np_dtype(kind) if kind else np.uint8)
    fields = {"grid": Grid(numbers.scales[0], numbers.zeros[0])}
    if len(numbers.scales) > 1:  # steps of 1, with a scale a channel before and behind them
        scale, shift = _of_channels(numbers)
        fields = {"scale": 1 / scale, "shift": shift, "grid": Grid(1.0, numbers.zeros[0])}
    reader.add(Affine, node, node.input[:1], reader.shape(node.input[0]), **fields)
    reader.quantised[node.output[0]] = numbers


def read_dequantize(reader, node) -> None:
    made = reader.quantised.get(node.input[0])
    if made is None or made != _numbers(reader, node, made.dtype):
        raise ValueError(f"{title(node)} reads other numbers than a QuantizeLinear with its scale and zero point makes")
    if len(made.scales) == 1:
        reader.alias[node.output[0]] = reader.tensor(node.input[0])
        return
    scale, shift = _of_channels(made)
    fields = {"scale": scale, "shift": None if shift is None else -shift * scale}
    reader.add(Affine, node, node.input[:1], reader.shape(node.input[0]), **fields)


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
