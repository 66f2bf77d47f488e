"""The parts of an NCHWc convolution's tile: its product, and the prologues that compute the layers in front of it.

`conv` is the nchwc_conv.NCHWcConv whose tile it is.
"""

from collections.abc import Callable
from functools import partial

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout, Taps
from ..targets import Machine
from .emit import Sums, by_shape, load, multiply_add, scratch, splat, store, when
from .gather import Window
from .instructions import as_steps
from .product import Product
from .tiles import Strip, deal


def reads(strip: Strip, taps: Taps, x: Layout) -> list[int]:
    """Where the pixels of a tile are read, counted from the first one."""
    return [row * taps.stride[0] * x.row_stride + column * taps.stride[1] * x.block for row, column in strip.pixels]


def multiply(
    machine: Machine, conv, strip: Strip, x, read, constants, groups, finish: Callable, inner: bool = False
) -> None:
    """Groups of rows of a tile; `finish(number, values)` stores a run of channels of all its pixels.

    x[read] is the first tap of the tile's first pixel. groups: (the first one, how many). inner: x is the scratch that
    the depthwise convolution wrote.
    """
    taps, source, gather = Taps() if inner else conv.taps, conv.columns_in, conv.gather
    if inner:
        strip = Strip(tuple((0, r) for r in range(len(strip.pixels))), ())
    places = [(x, read, reads(strip, taps, source))]
    if gather:
        planes, near = gather.planes(), gather.gathered(source.dtype)
        window = Window.of(strip, taps, source, gather.width)
        gather.transpose(window, x, read, source.block_stride, planes)
        places.append((near, 0, [gather.place(pixel) for pixel in window.taken]))

    def one(group) -> None:
        if gather:
            gather.interleave(window, planes, constants["tuples"], constants["channels"], group, near)
        _multiply_group(machine, conv.product, places, constants, group, finish)

    first, count = groups
    if count == 1:
        one(first)
    else:
        with T.serial(count) as number:
            one(T.bind(first + number))


def _multiply_group(machine: Machine, product: Product, places, constants, group, finish: Callable) -> None:
    """One group; places: for the map, and perhaps a scratch, (buffer, the first column, where every pixel reads)."""
    weight, offset, pointer, bias = (constants[name] for name in ("weight", "offset", "pointer", "bias"))
    lanes, count, unroll = machine.lanes, len(places[0][2]), product.unroll
    vectors, dtype = product.group // lanes, "int32" if product.integer else "float32"
    first = constants["start"] if product.integer else bias
    sums = Sums(unroll * vectors * count, lanes, dtype)
    every = [(v, r) for r in range(count) for v in range(vectors)]

    def at(u, v, r):
        return (u * vectors + v) * count + r

    for v, r in every:
        sums[at(0, v, r)] = load(first, group * product.group + v * lanes, lanes)
        for u in range(1, unroll):
            sums[at(u, v, r)] = T.broadcast(T.Cast(dtype, T.int32(0)), lanes)

    for number, (x, read, taken) in enumerate(places):

        def column(w, o, u, x=x, read=read, taken=taken):
            start = T.bind(read + offset[o])
            for v, r in every:
                place = w * product.group + v * lanes
                sums[at(u, v, r)] = multiply_add(sums[at(u, v, r)], x, start + taken[r], weight, place, lanes)

        product.over_columns(machine, group, number, pointer, weight, column)

    def total(v: int, r: int):
        value = sums[at(0, v, r)]
        for u in range(1, unroll):
            value = value + sums[at(u, v, r)]
        if not product.integer:
            return value
        row = group * product.group + v * lanes
        return T.Cast(f"float32x{lanes}", value) * load(constants["scale"], row, lanes) + load(bias, row, lanes)

    full = -(-product.rows // lanes) - (product.groups - 1) * vectors  # runs of the last group
    for v in range(vectors):
        with when(group < product.groups - 1, v >= full):
            finish(group * vectors + v, [total(v, r) for r in range(count)])


def slide(machine: Machine, conv, strip: Strip, x, read, weight, bias, number, target, write) -> None:
    """One run of channels of a tile of the depthwise convolution, into a scratch."""
    x, (taps, epilogue) = as_steps(x), conv.depthwise
    lanes, offsets = machine.lanes, taps.offsets(conv.middle)
    pixels = list(enumerate(reads(strip, taps, conv.middle)))
    for some in deal(pixels, machine.window_sums):
        sums = Sums(len(some), lanes)
        for i in range(len(some)):
            sums[i] = load(bias, number * lanes, lanes)
        for tap, offset in enumerate(offsets):
            for i, (_, taken) in enumerate(some):
                value = load(x, read + offset + taken, lanes)
                value = value * load(weight, (number * len(offsets) + tap) * lanes, lanes)
                sums[i] = sums[i] + value
        for i, (r, _) in enumerate(some):
            epilogue.store(target, write + r * conv.columns_in.block, sums[i], lanes)


def separable(machine: Machine, conv, strip: Strip, x, read, constants, finish: Callable) -> None:
    """A tile of a depthwise convolution, and then all rows of the pointwise one behind it."""
    weight, bias = constants["depthwise"], constants["depthwise_bias"]
    lanes, inner = machine.lanes, conv.columns_in
    near = scratch(inner)
    with T.serial(conv.middle.runs(lanes)) as number:
        at = T.bind(read + conv.middle.run(number, lanes))
        slide(machine, conv, strip, x, at, weight, bias, number, near, T.bind(inner.run(number, lanes)))
    multiply(machine, conv, strip, near, 0, constants, (0, conv.product.groups), finish, inner=True)


def expand_rows(machine: Machine, conv, x, image, band, middle, constants) -> None:
    """The rows of the expansion that a band needs: zeros where they lie outside of the map."""
    inner, taps, m, lanes = conv.expand, conv.depthwise[0], conv.middle, machine.lanes
    source = inner.depthwise[0] if inner.depthwise else inner.taps
    with T.serial(m.rows) as row:
        number = T.bind(band * (conv.band * taps.stride[0]) + row - taps.pad[0])
        with T.If(T.And(number >= 0, number < conv.x.rows)):
            with T.Then():

                def code(strip: Strip, tile) -> None:
                    read, at = (T.bind(constants["tiles"][tile * 3 + i]) for i in range(2))
                    read = T.bind(image * inner.x.size + number * (source.stride[0] * inner.x.row_stride) + read)

                    def finish(channels, values):
                        to = T.bind(m.run(channels, lanes) + row * m.row_stride + at)
                        for (_, column), value in zip(strip.pixels, values, strict=True):
                            inner.epilogue.store(middle, to + column * m.block, value, lanes)

                    if inner.depthwise:
                        separable(machine, inner, strip, x, read, constants, finish)
                        return
                    multiply(machine, inner, strip, x, read, constants, (0, inner.product.groups), finish)

                with T.serial(inner.tiles) as tile:
                    by_shape(tile, inner.strips, partial(code, tile=tile))
                with T.serial(m.runs(lanes)) as channels:
                    for i in range(m.halo):
                        for column in (i - m.halo, m.columns + i):
                            at = m.run(channels, lanes) + row * m.row_stride + m.at(0, column)
                            store(middle, at, splat(0.0, lanes), lanes)
            with T.Else(), T.serial(m.runs(lanes)) as channels, T.serial(m.row_stride // m.block) as i:
                at = m.run(channels, lanes) + m.at(0, -m.halo) + row * m.row_stride + i * m.block
                store(middle, at, splat(0.0, lanes), lanes)
