"""Which expansions of inverted residuals are computed inside of the next convolution's kernel, and by how many rows."""

import numpy as np

from ..kernels.family import Expansion
from ..onnx.geometry import Polyphase, nchw
from ..onnx.graph import Conv, Graph
from ..targets import Machine

# For an expansion alone, and for one with a depthwise convolution in front of it. WIDE: how many times the second cache
# its output must exceed to be worth it. TWICE: the part of its rows that may be computed twice.
WIDE, TWICE = (1, 2), (1.0, 0.125)


def band_of(graph: Graph, node: Conv, expand: Conv, machine: Machine) -> int:
    """How many rows of `node` to compute together with its expansion, so that the latter stays in the cache.

    As few rows as possible are computed twice, and as few threads as possible wait for the last band. 0: none fits.
    """
    window, (batch, channels, _, columns) = Polyphase.of(graph, node.depthwise), nchw(graph.shapes[expand.output])
    taps, rows = window.taps, window.out_rows
    row = machine.itemsize * channels * (columns + 2 * taps.pad[1])
    high = {band: taps.kernel[0] + (band - 1) * taps.stride[0] for band in range(1, rows) if rows % band == 0}
    most = machine.core.l2_bytes * 3 // 4
    fit = [band for band in high if row * (high[band] + 2 * taps.pad[1]) <= most]
    return min(fit, key=lambda band: -(-batch * rows // band // machine.threads) * high[band], default=0)


def expansions(graph: Graph, nchwc: set[str], machine: Machine) -> dict[str, Expansion]:
    """Pointwise convolutions whose output would leave the cache before the depthwise one behind them reads it.

    By the output of the convolution that computes them. nchwc: the tensors that are made in NCHWc.
    """
    found, makers = {}, {node.output: node for node in graph.nodes}
    for node in graph.nodes:
        expand = isinstance(node, Conv) and node.depthwise and makers.get(node.inputs[0])
        if not isinstance(expand, Conv) or node.output not in nchwc or expand.output not in nchwc:
            continue
        window, source = Polyphase.of(graph, node.depthwise), nchw(graph.shapes[expand.inputs[0]])
        plain = expand.weight.shape[2:] == (1, 1) and expand.output not in found and len(expand.inputs) == 1
        plain = plain and expand.stride == (1, 1) and expand.pad == (0, 0) and expand.inputs[0] in nchwc
        separable = expand.depthwise is not None
        wide = machine.itemsize * np.prod(nchw(graph.shapes[expand.output])[1:])
        large = wide > WIDE[separable] * machine.core.l2_bytes and source[2] * source[3] > 1
        if not plain or not large or window.halo > min(window.taps.pad) or graph.only_user(expand) is not node:
            continue
        expansion = Expansion(expand, band_of(graph, node, expand, machine))
        new = window.taps.stride[0] * expansion.band  # rows of the expansion
        if window.taps.kernel[0] - window.taps.stride[0] <= new * TWICE[separable]:
            found[node.output] = expansion
    return found
