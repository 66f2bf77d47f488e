"""What every ONNX operator becomes, as opsets from reader.OPSET on define it: one function each, in READERS."""

import math
from collections.abc import Callable

import numpy as np

from .bounds import title
from .graph import Activation, Affine, Concat, Conv, Mean, SlicePad, View
from .quantised import read_dequantize, read_quantize
from .windows import read_conv, read_pool


def _matrix(reader, node) -> None:
    a = reader.attributes(node)
    weight = reader.constant(node, 1).astype(np.float32)
    shape = reader.shape(node.input[0])
    if weight.ndim != 2 or len(shape) != 2 or a.get("transA"):
        raise ValueError(f"{title(node)} is not (batch, features) times a constant matrix")
    weight = (weight if a.get("transB") else weight.T) * np.float32(a.get("alpha", 1.0))
    bias = reader.constant(node, 2, np.zeros(1)) * a.get("beta", 1.0)
    if bias.shape[:-1] not in ((), (1,)):  # a column (B, 1) differs between pictures
        raise ValueError(f"{title(node)} has a bias of shape {bias.shape}; only one number, or one a feature, is")
    bias = np.broadcast_to(bias.reshape(-1), len(weight)).astype(np.float32)
    reader.add(Conv, node, node.input[:1], (shape[0], len(weight)), weight=weight[:, :, None, None], bias=bias)


def _batch_norm(reader, node) -> None:
    if reader.attributes(node).get("training_mode"):
        raise ValueError(f"{title(node)} is in training mode, and would use the statistics of the batch: export eval()")
    gamma, beta, mean, variance = (reader.constant(node, i).astype(np.float64) for i in range(1, 5))
    scale = gamma / np.sqrt(variance + reader.attributes(node).get("epsilon", 1e-5))
    shift = beta - mean * scale
    if scale.shape != reader.shape(node.input[0])[1:2]:
        raise ValueError(f"{title(node)} has {len(scale)} channels, its input {reader.shape(node.input[0])}")
    _affine(reader, node, node.input[0], scale=scale.astype(np.float32), shift=shift.astype(np.float32))


def _affine(reader, node, x: str, **fields) -> None:
    shape = reader.shape(x)
    names = [reader.tensor(v) for v in (fields.get("scale"), fields.get("shift")) if isinstance(v, str)]
    fields = {k: reader.tensor(v) if isinstance(v, str) else v for k, v in fields.items()}
    reader.add(Affine, node, [x, *names], shape, **fields)


def _operand(reader, node, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A constant operand as (C,)."""
    value = np.asarray(value, np.float32)
    channel = tuple(length if axis == 1 else 1 for axis, length in enumerate(shape))
    aligned = (1,) * (len(shape) - value.ndim) + value.shape
    if len(aligned) != len(shape) or any(n not in (1, c) for n, c in zip(aligned, channel, strict=True)):
        raise ValueError(f"{title(node)} has a constant of shape {value.shape}; only one number, or one a channel, is")
    return np.broadcast_to(value.reshape(-1), int(np.prod(channel))).copy()


def _arithmetic(reader, node) -> None:
    first, second = node.input
    op = node.op_type
    if first in reader.constants and op in ("Add", "Mul"):
        first, second = second, first
    if second in reader.constants and first not in reader.constants:
        value = _operand(reader, node, reader.constants[second], reader.shape(first))
        if op in ("Add", "Sub"):
            _affine(reader, node, first, shift=value if op == "Add" else -value)
        else:
            _affine(reader, node, first, scale=value if op == "Mul" else 1 / value)
        return
    if op not in ("Add", "Mul") or first in reader.constants:
        raise ValueError(f"{title(node)} is supported only with a constant second operand")
    if np.prod(reader.shape(first)) < np.prod(reader.shape(second)):
        first, second = second, first
    large, small = reader.shape(first), reader.shape(second)
    if small not in (large, large[:2] + (1,) * (len(large) - 2)):
        raise ValueError(f"{title(node)} has operands of shapes {large} and {small}, which is not supported")
    _affine(reader, node, first, **{"shift" if op == "Add" else "scale": second})


def _activation(make: Callable) -> Callable:
    def read(reader, node) -> None:
        shape = reader.shape(node.input[0])
        reader.add(Affine, node, node.input[:1], shape, activation=make(reader, node, reader.attributes(node)))

    return read


def _clip(reader, node, a: dict) -> Activation:
    low, high = reader.constant(node, 1), reader.constant(node, 2)
    low, high = (None if v is None else float(np.asarray(v).reshape(())) for v in (low, high))
    if any(limit is not None and math.isnan(limit) for limit in (low, high)):
        raise ValueError(f"{title(node)} has a limit that is not a number")
    return "clip", low, high


def _axis(node, axis: int, length: int) -> int:
    """An axis counted from the front, of `length` axes."""
    if not -length <= axis < length:
        raise ValueError(f"{title(node)} has an axis {axis} of a tensor that has {length}")
    return int(axis) % length


def _mean(reader, node) -> None:
    shape = reader.shape(node.input[0])
    a = reader.attributes(node)
    if node.op_type == "ReduceMean":
        axes = reader.constant(node, 1, ())
        if sorted(_axis(node, axis, len(shape)) for axis in axes) != [2, 3]:
            raise ValueError(f"{title(node)} is no mean over height and width")
    keep = node.op_type == "GlobalAveragePool" or a.get("keepdims", 1)
    reader.add(Mean, node, node.input[:1], shape[:2] + ((1, 1) if keep else ()))


def _view(reader, node) -> None:
    shape = reader.shape(node.input[0])
    a = reader.attributes(node)
    if node.op_type == "Flatten":
        axis = a.get("axis", 1)
        axis = axis if axis == len(shape) else _axis(node, axis, len(shape))  # behind the last one, too
        new = [int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))]
    elif node.op_type == "Reshape":
        new = [shape[i] if n == 0 else int(n) for i, n in enumerate(reader.constant(node, 1))]
        new = [int(np.prod(shape)) // -int(np.prod(new)) if n == -1 else n for n in new]
    else:
        axes = [int(axis) for axis in reader.constant(node, 1, ())]
        if node.op_type == "Squeeze":
            axes = [_axis(node, axis, len(shape)) for axis in axes] or [i for i, n in enumerate(shape) if n == 1]
            new = [n for i, n in enumerate(shape) if i not in axes]
        else:
            new = list(shape)
            for axis in sorted(_axis(node, axis, len(shape) + len(axes)) for axis in axes):
                new.insert(axis, 1)
    if np.prod(new) != np.prod(shape):
        raise ValueError(f"{title(node)} gives {shape} the shape {tuple(map(int, new))}, which holds another number")
    reader.add(View, node, node.input[:1], new)


def _pad(reader, node) -> None:
    shape, a = reader.shape(node.input[0]), reader.attributes(node)
    if a.get("mode", b"constant") != b"constant":
        raise ValueError(f"{title(node)} pads by {a['mode'].decode()}, only constant is supported")
    pads = [int(n) for n in reader.constant(node, 1)]
    fill = float(reader.constant(node, 2, np.zeros(())).reshape(()))
    axes = [_axis(node, n, len(shape)) for n in reader.constant(node, 3, range(len(shape)))]
    before, after = [0] * len(shape), [0] * len(shape)
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    new = [n + b + e for n, b, e in zip(shape, before, after, strict=True)]
    steps = (1,) * len(shape)
    reader.add(SlicePad, node, node.input[:1], new, starts=tuple(-b for b in before), steps=steps, fill=fill)


def _slice(reader, node) -> None:
    shape = reader.shape(node.input[0])
    starts, ends = reader.constant(node, 1), reader.constant(node, 2)
    axes = reader.constant(node, 3, np.arange(len(starts)))
    steps = reader.constant(node, 4, np.ones(len(starts), np.int64))
    ranges = [range(n) for n in shape]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        ranges[axis] = range(shape[axis])[int(start) : int(end) : int(step)]
    reader.add(
        SlicePad, node, node.input[:1], map(len, ranges),
        starts=tuple(r.start for r in ranges), steps=tuple(r.step for r in ranges),
    )  # fmt: skip


def _concat(reader, node) -> None:
    if any(name in reader.constants for name in node.input):
        raise ValueError(f"{title(node)} joins a constant, which is not supported")
    shapes = [reader.shape(name) for name in node.input]
    axis = _axis(node, reader.attributes(node)["axis"], len(shapes[0]))
    shape = list(shapes[0])
    shape[axis] = sum(s[axis] for s in shapes)
    reader.add(Concat, node, list(node.input), shape, axis=axis)


MOST_SLICES = 64  # that one transposition may be cut into


def _split(reader, node) -> None:
    shape, a = reader.shape(node.input[0]), reader.attributes(node)
    axis = _axis(node, a.get("axis", 0), len(shape))
    even = -(-shape[axis] // len(node.output))
    lengths = reader.constant(node, 1, [min(even, shape[axis] - i * even) for i in range(len(node.output))])
    for output, start, length in zip(node.output, np.cumsum([0, *lengths]), lengths, strict=False):
        _cut(reader, node, reader.tensor(node.input[0]), output, axis, int(start), int(length))


def _cut(reader, node, x: str, output: str, axis: int, start: int, length: int) -> str:
    """x[..., start : start + length, ...] along an axis."""
    shape = list(reader.shape(x))
    starts = tuple(start if i == axis else 0 for i in range(len(shape)))
    shape[axis] = length
    return reader.put(SlicePad, node, [x], output, shape, starts=starts, steps=(1,) * len(shape))


def _transpose(reader, node) -> None:
    """Two neighbouring runs of axes change places (channel shuffle, NHWC to NCHW): slices of one, laid side by side."""
    shape, x = reader.shape(node.input[0]), reader.tensor(node.input[0])
    order = list(reader.attributes(node).get("perm", range(len(shape))[::-1]))
    new = [shape[axis] for axis in order]
    moved = [axis for axis in order if shape[axis] > 1]  # axes of length one do not matter
    at = [i for i, (axis, plain) in enumerate(zip(moved, sorted(moved), strict=True)) if axis != plain]
    if not at:
        reader.add(View, node, [x], new)
        return
    run, plain = moved[at[0] : at[-1] + 1], sorted(moved)[at[0] : at[-1] + 1]
    turn = run.index(plain[0])
    first, second = (int(np.prod([shape[axis] for axis in part])) for part in (run[turn:], run[:turn]))
    outer = int(np.prod([shape[axis] for axis in moved[: at[0]]]))
    inner = int(np.prod(shape)) // (outer * first * second)
    if run[turn:] + run[:turn] != plain or min(first, second) > MOST_SLICES:
        raise ValueError(f"{title(node)} permutes {shape} by {order}, which is not supported")
    axis, count = (1, first) if first <= second else (2, second)
    y = node.output[0]
    flat = reader.put(View, node, [x], f"{y}:flat", (outer, first, second, inner))
    parts = [_cut(reader, node, flat, f"{y}:{i}", axis, i, 1) for i in range(count)]
    turned = (outer, second, 1, inner) if axis == 1 else (outer, 1, first, inner)
    parts = [reader.put(View, node, [part], f"{part}:turned", turned) for part in parts]
    whole = reader.put(Concat, node, parts, f"{y}:whole", (outer, second, first, inner), axis=3 - axis)
    reader.add(View, node, [whole], new)


def _same(reader, node) -> None:
    reader.alias[node.output[0]] = reader.tensor(node.input[0])


def _dropout(reader, node) -> None:
    if reader.constant(node, 2, False):
        raise ValueError(f"{title(node)} is in training mode, and would drop values by chance: export eval()")
    _same(reader, node)


READERS: dict[str, Callable] = {
    "Conv": read_conv,
    "Gemm": _matrix,
    "MatMul": _matrix,
    "BatchNormalization": _batch_norm,
    "Relu": _activation(lambda reader, node, a: ("clip", 0.0, None)),
    "Clip": _activation(_clip),
    "LeakyRelu": _activation(lambda reader, node, a: ("leaky_relu", a.get("alpha", 0.01))),
    "Sigmoid": _activation(lambda reader, node, a: ("sigmoid",)),
    "HardSwish": _activation(lambda reader, node, a: ("hard_swish",)),
    "HardSigmoid": _activation(lambda reader, node, a: ("hard_sigmoid", a.get("alpha", 0.2), a.get("beta", 0.5))),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    **dict.fromkeys(("MaxPool", "AveragePool"), read_pool),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _mean),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _view),
    "QuantizeLinear": read_quantize,
    "DequantizeLinear": read_dequantize,
    "Identity": _same,
    "Dropout": _dropout,
    "Pad": _pad,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
    "Transpose": _transpose,
}
