"""From nodes whose maps lie in blocks of channels to calls of the kernels in `lanes`."""

from dataclasses import replace

import numpy as np

from . import lanes
from .blocks import pack
from .graph import Affine, Conv, Mean, Window
from .layout import planes_of, reach
from .tiles import strips


def _taps(node: Conv | Window) -> lanes.Taps:
    kernel = node.weight.shape[2:] if isinstance(node, Conv) else node.kernel
    return lanes.Taps(tuple(kernel), node.stride, node.pad, node.dilation)


def _depthwise(node: Window, width: int) -> list[np.ndarray]:
    """Weights (blocks, taps, lanes) and biases (blocks, lanes), flat."""
    channels = len(node.weight)
    extra = -channels % width
    weight = np.pad(node.weight.reshape(channels, -1), ((0, extra), (0, 0)))
    weight = weight.reshape(-1, width, weight.shape[1]).transpose(0, 2, 1)
    return [np.ascontiguousarray(a.reshape(-1), np.float32) for a in (weight, np.pad(node.bias, (0, extra)))]


def conv(p, node: Conv):
    from .lower import layer_row

    m, window = p.machine, node.first or node
    batch, _, rows, columns = p.shape(node.output)
    border = reach(planes_of(p.graph, window))
    # Pictures have too few channels for a block: their pixels are read as they are, inside a border.
    x, source = p.fetch(node.inputs[0], m.lanes if p.shape(node.inputs[0])[1] >= m.lanes else 1, border)
    y, choice = p.made(node.output), p.layout.choices[node.output]
    residual = [p.fetch(name, m.lanes) for name in node.inputs[1:]]
    spec = lanes.LaneGemm(
        batch, source, y, _taps(node), strips(rows, columns, choice.vectors), choice.group // m.lanes, 0, choice.sparse,
        choice.unroll, node.first and (_taps(node.first), node.first.activation), node.activation,
        residual[0][1] if residual else None, cycles=round(batch * choice.cycles),
    )  # fmt: skip
    inner = [spec.source.channel(c) for c in range(source.channels)]
    offsets = (np.array(inner)[:, None] + np.array(spec.taps.offsets(spec.source))).reshape(-1)
    packed = pack(node, p.layout.patterns[node.output], choice, offsets)
    spec = replace(spec, columns=len(packed.offset), rows_first=packed.weight.nbytes > 4 * source.size)
    arguments = [x, packed.weight, packed.offset, packed.pointer, packed.bias, np.array(spec.starts(), np.int32)]
    arguments += _depthwise(node.first, m.lanes) if node.first else []
    p.layers.append(layer_row(p, node))
    return p.call(lanes.lane_gemm, spec, [*arguments, *(value for value, _ in residual)], batch * y.size)


def window(p, node: Window):
    m = p.machine
    batch, _, rows, columns = p.shape(node.output)
    x, source = p.fetch(node.inputs[0], m.lanes, reach(planes_of(p.graph, node)))
    y, taps, tiles = p.made(node.output), _taps(node), strips(rows, columns, 14)
    spec = lanes.LaneWindow(node.kind, batch, source, y, taps, tiles, node.activation)
    starts = [at for s in tiles for start in s.starts for at in (taps.first(source, *start), y.at(*start))]
    weights = _depthwise(node, m.lanes) if node.kind == "conv" else []
    return p.call(lanes.lane_window, spec, [x, np.array(starts, np.int32), *weights], batch * y.size)


def affine(p, node: Affine):
    batch = p.shape(node.output)[0]
    x, source = p.fetch(node.inputs[0], p.machine.lanes)
    kinds, arguments, y = [], [x], p.made(node.output)
    for value in (node.scale, node.shift):
        if isinstance(value, str) and p.size(value) == p.size(node.output):
            argument, kind = p.fetch(value, p.machine.lanes)
        elif isinstance(value, str):
            argument, kind = p.planes(value), "images"
        else:
            argument, kind = value, None if value is None else "channels"
        kinds.append(kind)
        arguments += [] if kind is None else [argument.astype(np.float32) if kind == "channels" else argument]
    return p.call(
        lanes.lane_affine, lanes.LaneAffine(batch, source, y, *kinds, node.activation), arguments, batch * y.size
    )


def mean(p, node: Mean):
    x, source = p.fetch(node.inputs[0], p.machine.lanes)
    spec = lanes.LaneMean(p.shape(node.output)[0], source, node.activation)
    return p.call(lanes.lane_mean, spec, [x], p.size(node.output))


LOWER = {Conv: conv, Window: window, Affine: affine, Mean: mean}
