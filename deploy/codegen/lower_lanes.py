"""From nodes whose maps lie in blocks of channels to calls of the kernels in `lanes`."""

from dataclasses import replace

import numpy as np

from ..kernels import nchwc
from ..kernels.nchwc_conv import LaneGemm, Product, lane_gemm
from ..kernels.tiles import strips
from ..onnx.blocks import pack
from ..onnx.geometry import Map, Taps, planes_of, reach
from ..onnx.graph import Affine, Conv, Mean, Window
from ..plan.layout import band_of


def _taps(node: Conv | Window) -> Taps:
    kernel = node.weight.shape[2:] if isinstance(node, Conv) else node.kernel
    return Taps(tuple(kernel), node.stride, node.pad, node.dilation)


def _depthwise(node: Window, width: int) -> list[np.ndarray]:
    """Weights (blocks, taps, lanes) and biases (blocks, lanes), flat."""
    channels = len(node.weight)
    extra = -channels % width
    weight = np.pad(node.weight.reshape(channels, -1), ((0, extra), (0, 0)))
    weight = weight.reshape(-1, width, weight.shape[1]).transpose(0, 2, 1)
    return [np.ascontiguousarray(a.reshape(-1), np.float32) for a in (weight, np.pad(node.bias, (0, extra)))]


def _product(node: Conv, p, source: Map, taps: Taps) -> tuple[Product, list[np.ndarray]]:
    """The packed weights of a convolution whose columns lie in `source`."""
    choice = p.layout.choices[node.output]
    inner = [source.channel(c) for c in range(node.weight.shape[1])]
    offsets = (np.array(inner)[:, None] + np.array(taps.offsets(source))).reshape(-1)
    packed = pack(node, p.layout.patterns[node.output], choice, offsets)
    product = replace(_bare(node, choice), columns=len(packed.offset))
    return product, [packed.weight, packed.offset, packed.pointer, packed.bias]


def _bare(node: Conv, choice) -> Product:
    return Product(len(node.weight), choice.group, 0, choice.sparse, choice.unroll, node.activation)


def conv(p, node: Conv):
    m, y, expand = p.machine, p.made(node.output), p.layout.expansions.get(node.output)
    added = [p.fetch(name, m.lanes) for name in node.inputs[1:]]
    residual, wider = added[0][1] if added else None, []
    if expand is None:
        x, source = _source(p, node)
        spec, packed = _gemm(p, node, source, y, y.rows, residual=residual)
    else:
        x, source = _source(p, expand)
        wide, taps, band = p.made(expand.output), _taps(node.first), band_of(p.graph, node, expand, m.threads)
        high = (band - 1) * taps.stride[0] + taps.kernel[0]
        inner, wider = _gemm(p, expand, source, Map(wide.channels, high, wide.columns, m.lanes, taps.pad[1]), 1)
        spec, packed = _gemm(p, node, wide, y, band, residual=residual, expand=inner, band=band)
        spec = replace(spec, cycles=spec.cycles + inner.cycles)
    return p.call(lane_gemm, spec, [x, *packed, *wider, *(value for value, _ in added)], spec.batch * y.size)


def _source(p, node: Conv):
    """What a convolution reads, in blocks of channels, and its map."""
    # Pictures have too few channels for a block: their pixels are read as they are, inside a border.
    width = p.machine.lanes if p.shape(node.inputs[0])[1] >= p.machine.lanes else 1
    return p.fetch(node.inputs[0], width, reach(planes_of(p.graph, node.first or node)))


def _gemm(p, node: Conv, x: Map, y: Map, rows: int, **more) -> tuple[LaneGemm, list[np.ndarray]]:
    """The geometry of a convolution whose tiles are of `rows` rows together, and its constants."""
    choice, batch = p.layout.choices[node.output], p.shape(node.output)[0]
    spec = LaneGemm(
        batch, x, y, _taps(node), strips(rows, y.columns, choice.vectors), _bare(node, choice),
        node.first and (_taps(node.first), node.first.activation), cycles=round(batch * choice.cycles), **more,
    )  # fmt: skip
    product, packed = _product(node, p, spec.source, spec.taps)
    spec = replace(spec, product=product, rows_first=packed[0].nbytes > 4 * x.size)
    p.record(node)
    first = _depthwise(node.first, p.machine.lanes) if node.first else []
    return spec, [*packed, np.array(spec.starts(), np.int32), *first]


def window(p, node: Window):
    m = p.machine
    batch, _, rows, columns = p.shape(node.output)
    x, source = p.fetch(node.inputs[0], m.lanes, reach(planes_of(p.graph, node)))
    y, taps, tiles = p.made(node.output), _taps(node), strips(rows, columns, 14)
    spec = nchwc.LaneWindow(node.kind, batch, source, y, taps, tiles, node.activation)
    starts = [at for s in tiles for start in s.starts for at in (taps.first(source, *start), y.at(*start))]
    weights = _depthwise(node, m.lanes) if node.kind == "conv" else []
    return p.call(nchwc.lane_window, spec, [x, np.array(starts, np.int32), *weights], batch * y.size)


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
        nchwc.lane_affine, nchwc.LaneAffine(batch, source, y, *kinds, node.activation), arguments, batch * y.size
    )


def mean(p, node: Mean):
    x, source = p.fetch(node.inputs[0], p.machine.lanes)
    spec = nchwc.LaneMean(p.shape(node.output)[0], source, node.activation)
    return p.call(nchwc.lane_mean, spec, [x], p.size(node.output))


LOWER = {Conv: conv, Window: window, Affine: affine, Mean: mean}
