"""Maps in blocks of channels, and the kernels on them that are bound by memory: pooling, sums, products, turning.

A map lies in blocks of `lanes` channels, the channels of a block fastest, so every pixel of a block is one vector
(NCHW16c). A pixel's neighbour is the next vector whatever the width of the map is, and strides cost nothing.
"""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Map, Taps
from ..onnx.graph import Activation
from .emit import Sums, activate, branch, kernel, load, over, pick, splat, store, tasks
from .tiles import Strip, pieces


def clear_border(m: Map, y, at, when) -> None:
    """Zeros around a block of channels, written by the task that holds the condition."""
    if not m.border:
        return
    zero = splat(0.0, m.lanes)
    wide = m.border * m.pitch // m.lanes
    with T.If(when), T.Then():
        for begin in (0, (m.rows + m.border) * m.pitch):
            with T.serial(wide) as i:
                store(y, at + begin + i * m.lanes, zero, m.lanes)
        with T.serial(m.rows) as row:
            for i in range(m.border):
                store(y, at + m.at(0, i - m.border) + row * m.pitch, zero, m.lanes)
                store(y, at + m.at(0, m.columns + i) + row * m.pitch, zero, m.lanes)


@dataclass(frozen=True)
class LaneWindow:
    """A sum or maximum over each channel's own taps: depthwise convolution, average and maximum pooling."""

    kind: str  # conv, max, average
    batch: int
    x: Map
    y: Map
    taps: Taps
    strips: tuple[Strip, ...]
    activation: Activation


def lane_window(w: LaneWindow):
    lanes, offsets = w.y.lanes, w.taps.offsets(w.x)
    tiles = sum(len(strip.starts) for strip in w.strips)
    cycles = w.batch * w.y.blocks * w.y.rows * w.y.columns * len(offsets)

    def body(x, starts, *rest):
        y = rest[-1]

        def tile_code(strip: Strip, plane, block, tile):
            read, write = T.bind(plane * w.x.block + starts[tile * 2]), T.bind(plane * w.y.block + starts[tile * 2 + 1])
            sums = Sums(len(strip.pixels), lanes)
            for tap, offset in enumerate(offsets):
                for i, (row, column) in enumerate(strip.pixels):
                    at = read + offset + row * w.taps.stride[0] * w.x.pitch + column * w.taps.stride[1] * lanes
                    value = load(x, at, lanes)
                    if w.kind == "conv":
                        value = value * load(rest[0], (block * len(offsets) + tap) * lanes, lanes)
                    if tap:
                        total = sums[i]
                        value = T.max(total, value) if w.kind == "max" else total + value
                    elif w.kind == "conv":
                        value = load(rest[1], block * lanes, lanes) + value
                    sums[i] = value
            for i, (row, column) in enumerate(strip.pixels):
                value = sums[i]
                if w.kind == "average":
                    value = value * splat(1 / len(offsets), lanes)
                value = activate(value, w.activation, lanes)
                store(y, write + row * w.y.pitch + column * lanes, value, lanes)

        with tasks(w.batch * w.y.blocks * tiles, cycles) as number:
            plane, tile = T.bind(number // tiles), T.bind(number % tiles)
            block = T.bind(plane % w.y.blocks)
            ends, bodies = [], []
            for strip in w.strips:
                ends.append((ends[-1] if ends else 0) + len(strip.starts))
                bodies.append(lambda strip=strip: tile_code(strip, plane, block, tile))
            branch(tile, ends, bodies)
            clear_border(w.y, y, plane * w.y.block, tile == 0)

    buffers = [("x", w.batch * w.x.size, "float32"), ("tiles", 2 * tiles, "int32")]
    if w.kind == "conv":
        buffers += [("weight", w.y.blocks * len(offsets) * lanes, "float32"), ("bias", w.y.blocks * lanes, "float32")]
    return kernel([*buffers, ("y", w.batch * w.y.size, "float32")], body)


@dataclass(frozen=True)
class LaneAffine:
    """y = act(x * scale + shift). Operands: a Map (as x, perhaps with another border), "images" or "channels"."""

    batch: int
    x: Map
    y: Map
    scale: Map | str | None
    shift: Map | str | None
    activation: Activation


def lane_affine(a: LaneAffine):
    lanes, rows = a.y.lanes, a.y.rows

    def body(x, *rest):
        operands, y = list(rest[:-1]), rest[-1]
        kinds = [kind for kind in (a.scale, a.shift) if kind is not None]

        def at(m: Map, plane, row, column):
            return plane * m.block + m.at(0, 0) + row * m.pitch + column * lanes

        with tasks(a.batch * a.y.blocks * rows, a.batch * a.y.size / 8) as number:
            plane, row = T.bind(number // rows), T.bind(number % rows)
            image, block = plane // a.y.blocks, plane % a.y.blocks
            held = [
                None if isinstance(kind, Map)
                else T.bind(_channels(buffer, a.y, image if kind == "images" else 0, block))
                for buffer, kind in zip(operands, kinds, strict=True)
            ]  # fmt: skip
            with T.serial(a.y.columns) as column:
                value = load(x, at(a.x, plane, row, column), lanes)
                for index, (buffer, kind) in enumerate(zip(operands, kinds, strict=True)):
                    other = held[index]
                    if isinstance(kind, Map):
                        other = load(buffer, at(kind, plane, row, column), lanes)
                    value = value * other if index == 0 and a.scale is not None else value + other
                store(y, at(a.y, plane, row, column), activate(value, a.activation, lanes), lanes)
            clear_border(a.y, y, plane * a.y.block, row == 0)

    def size(kind) -> int:
        return a.batch * kind.size if isinstance(kind, Map) else a.y.channels * (a.batch if kind == "images" else 1)

    buffers = [("x", a.batch * a.x.size, "float32")]
    buffers += [(n, size(k), "float32") for n, k in (("scale", a.scale), ("shift", a.shift)) if k is not None]
    return kernel([*buffers, ("y", a.batch * a.y.size, "float32")], body)


def _channels(buffer, m: Map, image, block):
    """One value a channel of a block. The last block's missing channels get values of others: nobody reads them."""
    first = image * m.channels + block * m.lanes
    if m.channels % m.lanes == 0:
        return load(buffer, first, m.lanes)
    missing = -m.channels % m.lanes
    last = load(buffer, image * m.channels + m.channels - m.lanes, m.lanes)
    turned = pick(last, [*range(missing, m.lanes), *range(missing)], m.lanes)
    inside = T.min(first, image * m.channels + m.channels - m.lanes)
    return T.Select(T.broadcast(block < m.blocks - 1, m.lanes), load(buffer, inside, m.lanes), turned)


@dataclass(frozen=True)
class LaneMean:
    batch: int
    x: Map
    activation: Activation


def lane_mean(m: LaneMean):
    """y (images, channels): the mean of every map."""
    x_map, lanes, pixels = m.x, m.x.lanes, m.x.rows * m.x.columns

    def body(x, y):
        with tasks(m.batch * x_map.blocks, m.batch * x_map.size / 8) as plane:
            ways = min(x_map.columns, 8)  # sums side by side: additions take four cycles, and short sums round less
            sums = Sums(ways, lanes)
            for i in range(ways):
                sums[i] = splat(0.0, lanes)
            with T.serial(x_map.rows) as row:
                for column in range(x_map.columns) if x_map.columns <= 16 else ():
                    add(x, sums, plane, row, column, column % ways)
                if x_map.columns > 16:
                    with T.serial(x_map.columns) as column:
                        add(x, sums, plane, row, column, 0)
            parts = [sums[i] for i in range(ways)]
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
            value = T.bind(activate(parts[0] * splat(1 / pixels, lanes), m.activation, lanes))
            first = plane // x_map.blocks * x_map.channels + plane % x_map.blocks * lanes
            tail = x_map.channels % lanes
            if not tail:
                store(y, first, value, lanes)
                return
            with T.If(plane % x_map.blocks < x_map.blocks - 1):
                with T.Then():
                    store(y, first, value, lanes)
                with T.Else():
                    for at, width in pieces(tail, lanes):
                        store(y, first + at, pick(value, range(at, at + width), lanes), width)

    def add(x, sums, plane, row, column, way):
        at = plane * x_map.block + x_map.at(0, 0) + row * x_map.pitch + column * lanes
        sums[way] = sums[way] + load(x, at, lanes)

    return kernel([("x", m.batch * x_map.size, "float32"), ("y", m.batch * x_map.channels, "float32")], body)


@dataclass(frozen=True)
class Turn:
    """From one arrangement of a map to another."""

    batch: int
    x: Map
    y: Map


def turn(t: Turn):
    """Between planes and blocks of channels (`lanes` channels x `lanes` pixels at a time), or between borders."""
    x, y = t.x, t.y
    lanes = max(x.lanes, y.lanes)
    blocks, tail = -(-x.channels // lanes), x.channels % lanes

    def body(source, target):
        def copy(image, block, row) -> None:
            begin = T.bind(image * x.size + block * x.block + x.at(0, 0) + row * x.pitch)
            to = T.bind(image * y.size + block * y.block + y.at(0, 0) + row * y.pitch)
            over(
                x.columns * lanes, 16, lambda at, width: store(target, to + at, load(source, begin + at, width), width)
            )

        def exchange(image, block, row, count: int) -> None:  # `count` channels of this block
            begin = T.bind(image * x.size + block * (lanes // x.lanes) * x.block + x.at(0, 0) + row * x.pitch)
            to = T.bind(image * y.size + block * (lanes // y.lanes) * y.block + y.at(0, 0) + row * y.pitch)

            def some(at, width) -> None:  # pixels
                if y.lanes > 1:
                    read = [load(source, begin + c * x.block + at, width) for c in range(count)]
                    read += [splat(0.0, width)] * (lanes - count)
                    for i, value in enumerate(transpose(read, width)):
                        store(target, to + (at + i) * lanes, value, lanes)
                else:
                    read = [load(source, begin + (at + i) * lanes, lanes) for i in range(width)]
                    for c, value in enumerate(transpose(read, lanes)[:count]):
                        store(target, to + c * y.block + at, value, width)

            over(x.columns, lanes, some)

        with tasks(t.batch * blocks * x.rows, t.batch * x.channels * x.rows * x.columns) as number:
            row, block = T.bind(number % x.rows), T.bind(number // x.rows % blocks)
            image = T.bind(number // x.rows // blocks)
            if x.lanes == y.lanes:
                copy(image, block, row)
            elif tail and blocks > 1:
                with T.If(block < blocks - 1):
                    with T.Then():
                        exchange(image, block, row, lanes)
                    with T.Else():
                        exchange(image, block, row, tail)
            else:
                exchange(image, block, row, tail or lanes)
            if y.lanes > 1 or x.lanes == 1:
                clear_border(y, target, image * y.size + block * y.block, row == 0)

    buffers = [("x", t.batch * x.size, "float32"), ("y", t.batch * y.size, "float32")]
    return kernel(buffers, body)


def transpose(vectors: list, lanes: int) -> list:
    """`lanes` vectors of len(vectors) lanes, out of len(vectors) vectors of `lanes` lanes; both are powers of two.

    Interleaving the first half of the vectors with the second turns the bits of (vector, lane) by one.
    """
    count = len(vectors)
    if lanes == 1:
        return [T.Shuffle(vectors, list(range(count)))] if count > 1 else vectors
    vectors = [T.bind(v) for v in vectors]
    order = [i // 2 + i % 2 * lanes for i in range(2 * lanes)]
    for _ in range(count.bit_length() - 1):
        pairs = zip(vectors[: count // 2], vectors[count // 2 :], strict=True)
        vectors = [T.bind(T.Shuffle([a, b], half)) for a, b in pairs for half in (order[:lanes], order[lanes:])]
    if count <= lanes:
        return [pick(v, range(at, at + count), lanes) for v in vectors for at in range(0, lanes, count)]
    each = count // lanes
    return [T.Shuffle(vectors[i : i + each], list(range(count))) for i in range(0, count, each)]
