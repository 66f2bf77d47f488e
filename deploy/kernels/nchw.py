"""Kernels that know the height and width of a map: zero-padded planes, depthwise convolution, pooling, the mean.

A k x k convolution with stride s reads its input from *planes*: the padded map, split into its s x s phases (every
s-th row and column), so that each tap becomes a constant offset and consecutive outputs read consecutive inputs.
"""

from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Planes
from ..onnx.graph import Activation
from .emit import Sums, activate, kernel, load, over, pick, splat, store, tasks
from .tiles import Band, pieces

LOWEST = -3.4028234663852886e38  # what a maximum starts from, and what pads its borders


def _inside(phase: int, pad: int, stride: int, length: int, limit: int) -> tuple[int, int]:
    """The rows (or columns) [first, last) of a phase's plane that hold input rather than padding."""
    first = max(0, -(-(pad - phase) // stride))
    return first, max(first, min(limit, -(-(length + pad - phase) // stride)))


def _fill(target, at, length: int, value: float, lanes: int) -> None:
    if length:
        over(length, lanes, lambda i, width: store(target, at + i, splat(value, width), width))


def _copy_row(source, read, target, write, first: int, count: int, columns: int, stride: int, lanes: int) -> None:
    """target[i] = source[first + stride * i], of a source row of `columns`, without reading outside of it."""
    if stride == 1:
        for at, width in pieces(count, lanes):
            store(target, write + at, load(source, read + first + at, width), width)
    elif stride == 2 and columns > 1:
        for at, width in pieces(count, min(lanes, columns // 2)):
            begin = min(first + 2 * at, columns - 2 * width)  # the vector's last, unwanted lane may not leave the row
            chosen = [first + 2 * at - begin + 2 * i for i in range(width)]
            store(target, write + at, pick(load(source, read + begin, 2 * width), chosen, 2 * width), width)
    else:
        with T.serial(count) as i:
            store(target, write + i, source[read + first + i * stride], 1)


def _spread_channel(p: Planes, source, read, target, write, fill: float, lanes: int) -> None:
    for number, (phase_y, phase_x) in enumerate(p.phases):
        plane = write + number * p.height * p.width
        top, bottom = _inside(phase_y, p.pad[0], p.stride[0], p.rows, p.height)
        left, right = _inside(phase_x, p.pad[1], p.stride[1], p.columns, p.width)
        if right == left:
            top = bottom = 0
        _fill(target, plane, top * p.width, fill, lanes)
        _fill(target, plane + bottom * p.width, (p.height - bottom) * p.width, fill, lanes)
        if bottom == top:
            continue
        with T.serial(bottom - top) as i:
            row = T.bind(plane + (top + i) * p.width)
            begin = T.bind(read + ((top + i) * p.stride[0] + phase_y - p.pad[0]) * p.columns)
            first = left * p.stride[1] + phase_x - p.pad[1]
            _fill(target, row, left, fill, lanes)
            _fill(target, row + right, p.width - right, fill, lanes)
            _copy_row(source, begin, target, row + left, first, right - left, p.columns, p.stride[1], lanes)


@dataclass(frozen=True)
class Spread:
    channels: int  # of all images together
    planes: Planes
    lanes: int

    @property
    def total(self) -> int:
        """Floats of the output; a vector that runs over the last row's end stays inside."""
        return self.channels * self.planes.size + self.lanes


def spread(s: Spread):
    """x (channels, rows, columns) -> its padded, split planes."""
    p = s.planes

    def body(x, y):
        with tasks(s.channels, s.total / 4) as c:
            _spread_channel(p, x, c * (p.rows * p.columns), y, c * p.size, 0.0, s.lanes)

    return kernel([("x", s.channels * p.rows * p.columns, "float32"), ("y", s.total, "float32")], body)


@dataclass(frozen=True)
class Window:
    """A sum or maximum over each channel's own taps: depthwise convolution, average and maximum pooling."""

    kind: str  # conv, max, average
    batch: int
    channels: int
    planes: Planes
    bands: tuple[Band, ...]
    activation: Activation
    lanes: int


def window(w: Window):
    p, taps = w.planes, len(w.planes.offsets)
    fill = LOWEST if w.kind == "max" else 0.0
    pixels = p.out_rows * p.out_columns
    tiles = sum(len(band.starts) for band in w.bands)

    def body(x, starts, *rest):
        y = rest[-1]
        with tasks(w.batch * w.channels, w.batch * w.channels * (50 + p.size * (taps + 6) / w.lanes)) as c:
            plane = T.alloc_buffer((p.size + w.lanes,), "float32")
            _spread_channel(p, x, c * (p.rows * p.columns), plane, 0, fill, w.lanes)
            channel = T.bind(c % w.channels)

            def tile_code(band: Band, tile):
                read, write = T.bind(starts[tile * 2]), T.bind(c * pixels + starts[tile * 2 + 1])
                sums = [Sums(1, v.lanes) for v in band.vectors]
                for i, v in enumerate(band.vectors):
                    first = rest[1][channel] if w.kind == "conv" else fill
                    sums[i][0] = splat(first, v.lanes)
                for tap, offset in enumerate(p.offsets):
                    for i, v in enumerate(band.vectors):
                        value, total = load(plane, read + offset + v.source, v.lanes), sums[i][0]
                        if w.kind == "conv":
                            value = total + splat(rest[0][channel * taps + tap], v.lanes) * value
                        else:
                            value = T.max(total, value) if w.kind == "max" else total + value
                        sums[i][0] = value
                for i, v in enumerate(band.vectors):
                    total = sums[i][0]
                    if w.kind == "average":
                        total = total * splat(1 / taps, v.lanes)
                    for s in v.stores:
                        some = pick(total, range(s.lane, s.lane + s.width), v.lanes)
                        store(y, write + s.at, activate(some, w.activation, s.width), s.width)

            first = 0
            for band in w.bands:
                if len(band.starts) == 1:
                    tile_code(band, first)
                else:
                    with T.serial(len(band.starts)) as tile:
                        tile_code(band, first + tile)
                first += len(band.starts)

    buffers = [("x", w.batch * w.channels * p.rows * p.columns, "float32"), ("tiles", 2 * tiles, "int32")]
    if w.kind == "conv":
        buffers += [("weight", w.channels * taps, "float32"), ("bias", w.channels, "float32")]
    return kernel([*buffers, ("y", w.batch * w.channels * pixels, "float32")], body)


@dataclass(frozen=True)
class Small:
    """A depthwise convolution of maps so small that the maps of `together` channels fill a vector or two."""

    batch: int
    channels: int
    pixels: tuple[int, int]  # of an input and of an output map
    together: int  # a power of two
    taps: tuple[tuple[int, ...], ...]  # for each tap and output pixel, the input pixel it reads (any one, if none)
    activation: Activation
    lanes: int


def together(p: Planes, channels: int, lanes: int) -> int:
    """How many channels to treat at once; 0 if the maps are too large, or would leave lanes empty."""
    before, after = p.rows * p.columns, p.out_rows * p.out_columns
    if after > lanes or after & (after - 1):
        return 0
    most = min(lanes // after, channels)
    while most and most * before > 4 * lanes:
        most //= 2
    return 1 << (most.bit_length() - 1) if most else 0


def small(p: Planes, batch: int, weight, bias, activation: Activation, lanes: int) -> tuple[Small, list[np.ndarray]]:
    """The geometry, and the constants that `small_window` reads: first channels, weights and biases of every lane."""
    channels, after = len(weight), p.out_rows * p.out_columns
    taps, reads = [], []
    for tap in range(p.kernel[0] * p.kernel[1]):
        ky, kx = divmod(tap, p.kernel[1])
        rows = np.arange(p.out_rows)[:, None] * p.stride[0] + ky * p.dilation[0] - p.pad[0]
        columns = np.arange(p.out_columns) * p.stride[1] + kx * p.dilation[1] - p.pad[1]
        inside = ((rows >= 0) & (rows < p.rows) & (columns >= 0) & (columns < p.columns)).reshape(-1)
        if inside.any():
            taps.append(weight.reshape(channels, -1)[:, tap, None] * inside)
            reads.append(tuple(np.where(inside, (rows * p.columns + columns).reshape(-1), 0).tolist()))
    count = together(p, channels, lanes)
    firsts = np.array([at for at, _ in pieces(channels, count)], np.int32)
    some = firsts[:, None] + np.arange(count)  # (groups, together)
    weights = np.stack(taps, 1)[some].transpose(0, 2, 1, 3)  # (groups, taps, together, pixels)
    biases = np.repeat(bias[some], after, axis=1)
    spec = Small(batch, channels, (p.rows * p.columns, after), count, tuple(reads), activation, lanes)
    return spec, [firsts, *(np.ascontiguousarray(a.reshape(-1), np.float32) for a in (weights, biases))]


def small_window(s: Small):
    """Each tap is a shuffle of the maps, times weights that are zero where the tap leaves the map."""
    before, after = s.pixels
    width, runs = s.together * after, pieces(s.together * before, s.lanes)
    starts = [at for at, _ in pieces(s.channels, s.together)]

    def body(x, firsts, weight, bias, y):
        with tasks(s.batch * len(starts), s.batch * len(starts) * (20 + 2 * len(s.taps))) as task:
            number = T.bind(task % len(starts))
            channel = T.bind(task // len(starts) * s.channels + firsts[number])
            maps = [T.bind(load(x, channel * before + at, lanes)) for at, lanes in runs]
            held = [at + i for at, lanes in runs for i in range(lanes)]
            total = load(bias, number * width, width)
            for tap, read in enumerate(s.taps):
                chosen = [held.index(c * before + pixel) for c in range(s.together) for pixel in read]
                some = T.Shuffle(maps * -(-width // len(held)), chosen) if width > 1 else x[channel * before + read[0]]
                total = total + load(weight, (number * len(s.taps) + tap) * width, width) * some
            store(y, channel * after, activate(total, s.activation, width), width)

    buffers = [("x", s.batch * s.channels * before, "float32"), ("firsts", len(starts), "int32")]
    buffers += [("weight", len(starts) * len(s.taps) * width, "float32"), ("bias", len(starts) * width, "float32")]
    return kernel([*buffers, ("y", s.batch * s.channels * after, "float32")], body)


@dataclass(frozen=True)
class Mean:
    channels: int  # of all images together
    pixels: int
    activation: Activation
    lanes: int


def _average(m: Mean, parts: list, y, c) -> None:
    while len(parts) > 1:  # in pairs: neither a long chain of additions nor its rounding
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    store(y, c, activate(parts[0] * T.float32(1 / m.pixels), m.activation, 1), 1)


def mean(m: Mean):
    """x (channels, pixels) -> y (channels): the mean of every map."""
    width = m.lanes if m.pixels > m.lanes else 1
    whole = m.pixels // width

    def body(x, y):
        with tasks(m.channels, m.channels * (10 + m.pixels)) as c:
            if width == 1:
                _average(m, [x[c * m.pixels + i] for i in range(m.pixels)], y, c)
                return
            sums = Sums(1, width)
            sums[0] = load(x, c * m.pixels, width)
            if whole > 1:
                with T.serial(whole - 1) as i:
                    more = load(x, c * m.pixels + (i + 1) * width, width)
                    sums[0] = sums[0] + more
            parts = [sums.buffers[0][i] for i in range(width)] + [
                x[c * m.pixels + i] for i in range(whole * width, m.pixels)
            ]
            _average(m, parts, y, c)

    return kernel([("x", m.channels * m.pixels, "float32"), ("y", m.channels, "float32")], body)
