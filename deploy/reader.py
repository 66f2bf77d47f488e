"""Read an ONNX file into a Graph.

What is constant is computed here, so a node's inputs are only tensors that depend on the picture. What cannot be read
is a ValueError of one line that names the node.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .graph import Activation, Affine, Concat, Conv, Graph, Mean, Move, Node, View, Window


class _Reader:
    """One ONNX node at a time; `constants` grows as nodes turn out to be computable."""

    def __init__(self, model):
        from onnx import helper, numpy_helper

        self.attribute_value = helper.get_attribute_value
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.alias: dict[str, str] = {}
        self.nodes: list[Node] = []

    def attributes(self, node) -> dict:
        return {a.name: self.attribute_value(a) for a in node.attribute}

    def constant(self, node, index: int, default=None) -> np.ndarray:
        """Input `index`, which must be constant; `default` if it is absent."""
        if index >= len(node.input) or not node.input[index]:
            return default
        if node.input[index] not in self.constants:
            raise ValueError(f"{_title(node)} needs a constant {node.input[index]!r}")
        return self.constants[node.input[index]]

    def read(self, node) -> None:
        inputs = [name for name in node.input if name]
        if node.op_type == "Shape" and self.tensor(inputs[0]) in self.shapes:
            start, end = (self.attributes(node).get(k, d) for k, d in (("start", 0), ("end", None)))
            self.constants[node.output[0]] = np.array(self.shapes[self.tensor(inputs[0])][start:end], np.int64)
        elif all(name in self.constants for name in inputs):
            from onnx.reference import ReferenceEvaluator

            values = ReferenceEvaluator(node).run(None, {name: self.constants[name] for name in inputs})
            self.constants.update(zip(node.output, values, strict=True))
        elif node.op_type in READERS:
            READERS[node.op_type](self, node)
        else:
            raise ValueError(f"{_title(node)} is not supported; supported are {', '.join(sorted(READERS))}")

    def tensor(self, name: str) -> str:
        return self.alias.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[self.tensor(name)]

    def add(self, make: type, node, inputs: list[str], shape, **fields) -> None:
        self.nodes.append(make(_name(node), [self.tensor(i) for i in inputs], node.output[0], **fields))
        self.shapes[node.output[0]] = tuple(int(length) for length in shape)


def _name(node) -> str:
    return node.name or node.output[0]


def _title(node) -> str:
    return f"node {_name(node)!r} (operator {node.op_type})"


def _sliding(reader: _Reader, node, kernel) -> dict:
    """Stride, dilation, pad and output size of a convolution or pooling."""
    a, (_, _, *size) = reader.attributes(node), reader.shape(node.input[0])
    if len(size) != 2:
        raise ValueError(f"{_title(node)} is not two-dimensional")
    stride, dilation = tuple(a.get("strides", (1, 1))), tuple(a.get("dilations", (1, 1)))
    pads = tuple(a.get("pads", (0, 0, 0, 0)))
    mode = a.get("auto_pad", b"NOTSET").decode()
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if mode.startswith("SAME"):
        total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, stride, reach, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = (*small, *large) if mode == "SAME_UPPER" else (*large, *small)
    out = []
    for axis in range(2):
        extra = size[axis] + pads[axis] + pads[axis + 2] - reach[axis]
        length = (-(-extra // stride[axis]) if a.get("ceil_mode") else extra // stride[axis]) + 1
        if a.get("ceil_mode") and (length - 1) * stride[axis] >= size[axis] + pads[axis]:
            length -= 1  # no window starts in the padding below
        if length < 1:
            raise ValueError(f"{_title(node)} leaves nothing of a map of {size[0]} x {size[1]}")
        out.append(length)
    return {"stride": stride, "dilation": dilation, "pad": pads[:2], "out": tuple(out), "pads": pads}


def _conv(reader: _Reader, node) -> None:
    weight = reader.constant(node, 1).astype(np.float32)
    bias = reader.constant(node, 2, np.zeros(len(weight))).astype(np.float32)
    s = _sliding(reader, node, weight.shape[2:])
    batch, channels = reader.shape(node.input[0])[:2]
    groups = reader.attributes(node).get("group", 1)
    common = {"bias": bias, "stride": s["stride"], "pad": s["pad"], "dilation": s["dilation"]}
    shape = (batch, len(weight), *s["out"])
    if groups == channels == len(weight):
        kernel = tuple(weight.shape[2:])
        reader.add(Window, node, node.input[:1], shape, kind="conv", kernel=kernel, weight=weight[:, 0], **common)
        return
    if groups > 1:  # an ordinary convolution with zeros, which the search for blocks will find
        whole = np.zeros((len(weight), channels, *weight.shape[2:]), np.float32)
        each = len(weight) // groups
        for g in range(groups):
            rows, part = slice(g * each, (g + 1) * each), channels // groups
            whole[rows, g * part : (g + 1) * part] = weight[rows]
        weight = whole
    reader.add(Conv, node, node.input[:1], shape, weight=weight, **common)


def _matrix(reader: _Reader, node) -> None:
    a = reader.attributes(node)
    weight = reader.constant(node, 1).astype(np.float32)
    shape = reader.shape(node.input[0])
    if weight.ndim != 2 or len(shape) != 2 or a.get("transA"):
        raise ValueError(f"{_title(node)} is not (batch, features) times a constant matrix")
    weight = (weight if a.get("transB") else weight.T) * a.get("alpha", 1.0)
    bias = reader.constant(node, 2, np.zeros(1)) * a.get("beta", 1.0)
    bias = np.broadcast_to(bias.reshape(-1), len(weight)).astype(np.float32)
    reader.add(Conv, node, node.input[:1], (shape[0], len(weight)), weight=weight[:, :, None, None], bias=bias)


def _pool(reader: _Reader, node) -> None:
    a = reader.attributes(node)
    kernel = tuple(a["kernel_shape"])
    s = _sliding(reader, node, kernel)
    kind = "max" if node.op_type == "MaxPool" else "average"
    if kind == "average" and a.get("ceil_mode"):
        raise ValueError(f"{_title(node)} rounds its size up, which is not supported for an average")
    if kind == "average" and any(s["pads"]) and not a.get("count_include_pad"):
        raise ValueError(f"{_title(node)} averages without the padding, which is not supported")
    if len(node.output) > 1:
        raise ValueError(f"{_title(node)} also returns indices, which is not supported")
    sliding = {k: s[k] for k in ("stride", "pad", "dilation")}
    shape = (*reader.shape(node.input[0])[:2], *s["out"])
    reader.add(Window, node, node.input[:1], shape, kind=kind, kernel=kernel, **sliding)


def _batch_norm(reader: _Reader, node) -> None:
    gamma, beta, mean, variance = (reader.constant(node, i).astype(np.float64) for i in range(1, 5))
    scale = gamma / np.sqrt(variance + reader.attributes(node).get("epsilon", 1e-5))
    shift = beta - mean * scale
    _affine(reader, node, node.input[0], scale=scale.astype(np.float32), shift=shift.astype(np.float32))


def _affine(reader: _Reader, node, x: str, **fields) -> None:
    shape = reader.shape(x)
    names = [reader.tensor(v) for v in (fields.get("scale"), fields.get("shift")) if isinstance(v, str)]
    fields = {k: reader.tensor(v) if isinstance(v, str) else v for k, v in fields.items()}
    reader.add(Affine, node, [x, *names], shape, **fields)


def _operand(reader: _Reader, node, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A constant operand as (C,)."""
    value = np.asarray(value, np.float32)
    channel = (1, shape[1]) + (1,) * (len(shape) - 2)
    aligned = (1,) * (len(shape) - value.ndim) + value.shape
    if len(aligned) != len(shape) or any(n not in (1, c) for n, c in zip(aligned, channel, strict=True)):
        raise ValueError(f"{_title(node)} has a constant of shape {value.shape}; only one number, or one a channel, is")
    return np.broadcast_to(value.reshape(-1), shape[1]).copy()


def _arithmetic(reader: _Reader, node) -> None:
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
        raise ValueError(f"{_title(node)} is supported only with a constant second operand")
    if np.prod(reader.shape(first)) < np.prod(reader.shape(second)):
        first, second = second, first
    large, small = reader.shape(first), reader.shape(second)
    if small not in (large, large[:2] + (1,) * (len(large) - 2)):
        raise ValueError(f"{_title(node)} has operands of shapes {large} and {small}, which is not supported")
    _affine(reader, node, first, **{"shift" if op == "Add" else "scale": second})


def _activation(make: Callable) -> Callable:
    def read(reader: _Reader, node) -> None:
        shape = reader.shape(node.input[0])
        reader.add(Affine, node, node.input[:1], shape, activation=make(reader, node, reader.attributes(node)))

    return read


def _clip(reader: _Reader, node, a: dict) -> Activation:
    low, high = reader.constant(node, 1, a.get("min")), reader.constant(node, 2, a.get("max"))
    return ("clip", *(None if v is None else float(np.asarray(v).reshape(())) for v in (low, high)))


def _mean(reader: _Reader, node) -> None:
    shape = reader.shape(node.input[0])
    a = reader.attributes(node)
    if node.op_type == "ReduceMean":
        axes = reader.constant(node, 1, a.get("axes", ()))
        if sorted(int(axis) % len(shape) for axis in axes) != [2, 3]:
            raise ValueError(f"{_title(node)} is no mean over height and width")
    keep = node.op_type == "GlobalAveragePool" or a.get("keepdims", 1)
    reader.add(Mean, node, node.input[:1], shape[:2] + ((1, 1) if keep else ()))


def _view(reader: _Reader, node) -> None:
    shape = reader.shape(node.input[0])
    a = reader.attributes(node)
    if node.op_type == "Flatten":
        axis = a.get("axis", 1) % len(shape)
        new = [int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))]
    elif node.op_type == "Reshape":
        new = [shape[i] if n == 0 else int(n) for i, n in enumerate(reader.constant(node, 1))]
        new = [int(np.prod(shape)) // -int(np.prod(new)) if n == -1 else n for n in new]
    else:
        axes = [int(axis) for axis in np.atleast_1d(reader.constant(node, 1, a.get("axes", ())))]
        if node.op_type == "Squeeze":
            axes = [axis % len(shape) for axis in axes] or [i for i, n in enumerate(shape) if n == 1]
            new = [n for i, n in enumerate(shape) if i not in axes]
        else:
            new = list(shape)
            for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
                new.insert(axis, 1)
    reader.add(View, node, node.input[:1], new)


def _pad(reader: _Reader, node) -> None:
    shape, a = reader.shape(node.input[0]), reader.attributes(node)
    if a.get("mode", b"constant") != b"constant":
        raise ValueError(f"{_title(node)} pads by {a['mode'].decode()}, only constant is supported")
    pads = [int(n) for n in reader.constant(node, 1, a.get("pads"))]
    fill = float(reader.constant(node, 2, np.array(a.get("value", 0.0))).reshape(()))
    axes = [int(n) % len(shape) for n in reader.constant(node, 3, range(len(shape)))]
    before, after = [0] * len(shape), [0] * len(shape)
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    new = [n + b + e for n, b, e in zip(shape, before, after, strict=True)]
    steps = (1,) * len(shape)
    reader.add(Move, node, node.input[:1], new, starts=tuple(-b for b in before), steps=steps, fill=fill)


def _slice(reader: _Reader, node) -> None:
    shape = reader.shape(node.input[0])
    starts, ends = reader.constant(node, 1), reader.constant(node, 2)
    axes = reader.constant(node, 3, np.arange(len(starts)))
    steps = reader.constant(node, 4, np.ones(len(starts), np.int64))
    ranges = [range(n) for n in shape]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        ranges[axis] = range(shape[axis])[int(start) : int(end) : int(step)]
    reader.add(
        Move, node, node.input[:1], map(len, ranges),
        starts=tuple(r.start for r in ranges), steps=tuple(r.step for r in ranges),
    )  # fmt: skip


def _concat(reader: _Reader, node) -> None:
    if any(name in reader.constants for name in node.input):
        raise ValueError(f"{_title(node)} joins a constant, which is not supported")
    shapes = [reader.shape(name) for name in node.input]
    axis = reader.attributes(node)["axis"] % len(shapes[0])
    shape = list(shapes[0])
    shape[axis] = sum(s[axis] for s in shapes)
    reader.add(Concat, node, list(node.input), shape, axis=axis)


def _same(reader: _Reader, node) -> None:
    reader.alias[node.output[0]] = reader.tensor(node.input[0])


READERS: dict[str, Callable] = {
    "Conv": _conv,
    "Gemm": _matrix,
    "MatMul": _matrix,
    "BatchNormalization": _batch_norm,
    "Relu": _activation(lambda reader, node, a: ("clip", 0.0, None)),
    "Clip": _activation(_clip),
    "HardSwish": _activation(lambda reader, node, a: ("hard_swish",)),
    "HardSigmoid": _activation(lambda reader, node, a: ("hard_sigmoid", a.get("alpha", 0.2), a.get("beta", 0.5))),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _mean),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _view),
    **dict.fromkeys(("Identity", "Dropout"), _same),
    "Pad": _pad,
    "Slice": _slice,
    "Concat": _concat,
}


def _input_shape(path, tensor, batch: int | None, image_size: tuple[int, int] | None) -> tuple[int, ...]:
    dims = [d.dim_value or d.dim_param or "?" for d in tensor.type.tensor_type.shape.dim]
    told = list(dims)
    if len(dims) == 4 and image_size:
        dims[2:] = [side if isinstance(d, str) else d for d, side in zip(dims[2:], image_size, strict=True)]
        if tuple(dims[2:]) != image_size:
            raise ValueError(f"--image_size {image_size[0]}x{image_size[1]}: {path} was exported for {told}")
    if not dims or any(isinstance(d, str) or d < 1 for d in dims[1:]):
        hint = "--image_size fixes height and width" if len(dims) == 4 else "only the batch may be"
        raise ValueError(f"{path} leaves a size of its input {tensor.name!r} open: {told}; {hint}")
    if isinstance(dims[0], str) or dims[0] < 1:
        dims[0] = batch or 1
    elif batch not in (None, dims[0]):
        raise ValueError(f"--batch {batch}: {path} was exported for a batch of {dims[0]}")
    return tuple(dims)


def read_onnx(path: str | Path, batch: int | None = None, image_size: tuple[int, int] | None = None) -> Graph:
    """The graph of an ONNX file. `batch` (1 if not said) and `image_size` fix what the file leaves open."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError("--onnx_path needs onnx: pip install onnx") from error

    if not Path(path).is_file():
        raise ValueError(f"--onnx_path {path}: there is no such file")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, checker and missing external data each raise their own kind
        raise ValueError(
            f"--onnx_path {path} is not a valid ONNX file ({str(error).strip().splitlines()[0]})"
        ) from error
    reader = _Reader(model)
    inputs = [i for i in model.graph.input if i.name not in reader.constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ValueError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs; one of each is supported"
        )
    reader.shapes[inputs[0].name] = _input_shape(path, inputs[0], batch, image_size)
    if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise ValueError(f"{path} does not take float32 pictures")
    for node in model.graph.node:
        reader.read(node)
    output = reader.tensor(model.graph.output[0].name)
    if output not in reader.shapes or output == inputs[0].name:
        raise ValueError(f"{path}: the output does not depend on the input")
    return Graph(reader.nodes, reader.shapes, inputs[0].name, output)
