"""What a plan computes, one node after the other in NumPy's float64: the obvious way, with the plan's roundings."""

import numpy as np
from ml_dtypes import bfloat16
from test_deploy import ACTIVATIONS

from deploy.kernels.nchw_row_conv import NCHWRowConv
from deploy.onnx import graph
from deploy.onnx.geometry import nchw
from deploy.plan import layout

GATES = {
    ("hard_sigmoid", 1 / 6, 0.5): lambda v: np.clip(v / 6 + 0.5, 0, 1),
    ("sigmoid",): lambda v: 1 / (1 + np.exp(-v)),
    ("swish",): lambda v: v / (1 + np.exp(-v)),
}


def rounded(values: np.ndarray) -> np.ndarray:
    """To the nearest number of bfloat16, of two equally near ones to the even one."""
    return values.astype(np.float32).astype(bfloat16).astype(np.float64)


def under_taps(x: np.ndarray, node, kernel, shape, border: float = 0.0):
    """((ky, kx), the values that this tap of a window sees for every output of `shape`)."""
    (rows, columns), ends = shape[2:], [n * s + k * d for n, s, k, d in zip(
        shape[2:], node.stride, kernel, node.dilation, strict=True
    )]  # fmt: skip
    x = np.pad(x, [(0, 0), (0, 0), *zip(node.pad, ends, strict=True)], constant_values=border)
    for ky, kx in np.ndindex(*kernel):
        seen = x[:, :, ky * node.dilation[0] :, kx * node.dilation[1] :][:, :, :: node.stride[0], :: node.stride[1]]
        yield (ky, kx), seen[:, :, :rows, :columns]


def compute(node: graph.Node, x: np.ndarray, others: list[np.ndarray], weight, shape) -> np.ndarray:
    """One node in float64, without its activation. weight: of a convolution, as it is multiplied."""
    match node:
        case graph.Conv():
            taps = under_taps(x, node, weight.shape[2:], shape)
            y = sum(np.einsum("oc,bchw->bohw", weight[:, :, ky, kx], seen) for (ky, kx), seen in taps)
            return sum(others, y + node.bias[:, None, None])
        case graph.Window(kind="conv"):
            taps = under_taps(x, node, node.kernel, shape)
            return sum(node.weight[:, ky, kx, None, None] * seen for (ky, kx), seen in taps) + node.bias[:, None, None]
        case graph.Window(kind="max"):
            return np.max([seen for _, seen in under_taps(x, node, node.kernel, shape, -np.inf)], axis=0)
        case graph.Window(kind="average"):
            return np.mean([seen for _, seen in under_taps(x, node, node.kernel, shape)], axis=0)
        case graph.Affine():
            others, operands = list(others), []
            for operand, nothing in ((node.scale, 1.0), (node.shift, 0.0)):
                if isinstance(operand, np.ndarray):
                    operands.append(operand[:, None, None])
                else:
                    operands.append(nothing if operand is None else others.pop(0))
            return x * operands[0] + operands[1]
        case graph.Mean():
            return x.mean((2, 3))
        case graph.View():
            return x
    raise AssertionError(node)


def oracle(network: graph.Graph, plan: layout.Plan, x: np.ndarray, stored=rounded) -> np.ndarray:
    """What `plan` computes in bfloat16: `stored` is done to all maps in NCHWc and to the weights that multiply them.

    The weights of classifiers (NCHWRowConv) are stored so, too; whatever else is in NCHW is left as it is.
    """
    values = {network.input: x.astype(np.float64)}

    def made(node, x, others, inside):
        x, *others = (stored(v) if inside and v.ndim == 4 and v[0, 0].size > 1 else v for v in (x, *others))
        weight = None
        if isinstance(node, graph.Conv):
            narrow = inside or plan.schedules[node.output].family is NCHWRowConv
            weight = stored(node.weight) if narrow else node.weight
        y = compute(node, x, others, weight, nchw(network.shapes[node.output]))
        y = {**ACTIVATIONS, **GATES}[node.activation](y)
        return stored(y) if inside and y.ndim == 4 and y[0, 0].size > 1 else y

    for node in network.nodes:
        x, *others = (values[name] for name in node.inputs)
        if isinstance(node, graph.Conv) and node.depthwise:
            x = made(node.depthwise, x, [], bool(plan.nchwc & {node.output, node.depthwise.output}))
        values[node.output] = made(node, x, others, node.output in plan.nchwc).reshape(network.shapes[node.output])
    return values[network.output]


def on_grid(values: np.ndarray, grid: graph.Grid | None) -> np.ndarray:
    """The nearest values that a quantised tensor may have, of two equally near ones that with the even step."""
    if grid is None:
        return values
    return (np.clip(np.rint(values / grid.scale) + grid.zero, 0, 255) - grid.zero) * grid.scale


def oracle_of_grids(network: graph.Graph, x: np.ndarray) -> np.ndarray:
    """What a quantised network computes, in float64, which holds integers and their steps exactly."""
    values = {network.input: x.astype(np.float64)}

    def made(node, x, others):
        conv = isinstance(node, graph.Conv)
        y = compute(node, x, [] if conv else others, conv and node.weight, nchw(network.shapes[node.output]))
        y = sum(others, on_grid(y, node.before)) if conv else y
        return on_grid({**ACTIVATIONS, **GATES}[node.activation](y), node.grid)

    for node in network.nodes:
        x, *others = (values[name] for name in node.inputs)
        if isinstance(node, graph.Conv) and node.depthwise:
            x = made(node.depthwise, x, [])
        values[node.output] = made(node, x, others).reshape(network.shapes[node.output])
    return values[network.output]
