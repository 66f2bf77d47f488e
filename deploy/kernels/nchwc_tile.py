"""The parts of an NCHWc convolution's tile: its product, and the prologues that compute the layers in front of it.

`conv` is the nchwc_conv.NCHWcConv whose tile it is.
"""

from collections.abc import Callable
from functools import partial

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout, Taps
from ..targets import Machine
from .emit import Sums, by_shape, load, splat, store, when
from .epilogue import activate
from .product import Product
from .tiles import Strip, deal


def reads(strip: Strip, taps: Taps, x: Layout) -> list[int]:
    """Where the pixels of a tile are read, counted from the first one."""
    return [row * taps.stride[0] * x.row_stride + column * taps.stride[1] * x.block for row, column in strip.pixels]


def multiply(
    machine: Machine, product: Product, block: int, pixels, x, read, taken, constants, group, finish: Callable
) -> None:
    """One group of rows of a tile; `finish(number, values=[(pixel, value), ...])` stores a block of channels of it.

    x[read + taken[r]] is pixel r of the first column, and constants are what product.pack made.
    """
    weight, offset, pointer, bias = constants
    vectors, count, unroll = product.group // block, len(pixels), product.unroll
    sums = Sums(unroll * vectors * count, block)
    every = [(v, r) for r in range(count) for v in range(vectors)]

    def at(u, v, r):
        return (u * vectors + v) * count + r

    for v, r in every:
        sums[at(0, v, r)] = load(bias, group * product.group + v * block, block)
        for u in range(1, unroll):
            sums[at(u, v, r)] = splat(0.0, block)

    def column(w, o, u):
        start = T.bind(read + offset[o])
        for v, r in every:
            value = splat(x[start + taken[r]], block) * load(weight, w * product.group + v * block, block)
            sums[at(u, v, r)] = sums[at(u, v, r)] + value

    product.over_columns(machine, group, pointer, weight, column)

    def total(v: int, r: int):
        value = sums[at(0, v, r)]
        for u in range(1, unroll):
            value = value + sums[at(u, v, r)]
        return value

    full = -(-product.rows // block) - (product.groups - 1) * vectors  # blocks of the last group
    for v in range(vectors):
        with when(group < product.groups - 1, v >= full):
            finish(group * vectors + v, values=[(pixel, total(v, r)) for r, pixel in enumerate(pixels)])


def slide(machine: Machine, conv, strip: Strip, x, read, weight, bias, number, scratch, write) -> None:
    """One block of channels of a tile of the depthwise convolution, into the scratch."""
    taps, activation = conv.depthwise
    block, offsets = conv.block, taps.offsets(conv.middle)
    pixels = list(enumerate(reads(strip, taps, conv.middle)))
    for some in deal(pixels, machine.window_sums):
        sums = Sums(len(some), block)
        for i in range(len(some)):
            sums[i] = load(bias, number * block, block)
        for tap, offset in enumerate(offsets):
            for i, (_, taken) in enumerate(some):
                value = load(x, read + offset + taken, block)
                value = value * load(weight, (number * len(offsets) + tap) * block, block)
                sums[i] = sums[i] + value
        for i, (r, _) in enumerate(some):
            store(scratch, write + r * block, activate(sums[i], activation, block), block)


def separable(machine: Machine, conv, strip: Strip, x, read, constants, finish: Callable) -> None:
    """A tile of a depthwise convolution, and then all rows of the pointwise one behind it."""
    *constants, _, weight, bias = constants
    scratch = T.alloc_buffer((conv.columns_in.size,), "float32")
    with T.serial(conv.middle.blocks) as number:
        at = read + number * conv.middle.block_stride
        slide(machine, conv, strip, x, at, weight, bias, number, scratch, number * conv.columns_in.block_stride)
    with T.serial(conv.product.groups) as group:
        taken = [r * conv.block for r in range(len(strip.pixels))]
        multiply(machine, conv.product, conv.block, strip.pixels, scratch, 0, taken, constants, group, finish)


def expand_rows(machine: Machine, conv, x, image, band, middle, constants) -> None:
    """The rows of the expansion that a band needs: zeros where they lie outside of the map."""
    inner, taps, m, block = conv.expand, conv.depthwise[0], conv.middle, conv.block
    source = inner.depthwise[0] if inner.depthwise else inner.taps
    with T.serial(m.rows) as row:
        number = T.bind(band * (conv.band * taps.stride[0]) + row - taps.pad[0])
        with T.If(T.And(number >= 0, number < conv.x.rows)):
            with T.Then():

                def code(strip: Strip, tile) -> None:
                    read, at = (T.bind(constants[4][tile * 3 + i]) for i in range(2))
                    read = T.bind(image * inner.x.size + number * (source.stride[0] * inner.x.row_stride) + read)

                    def finish(channels, values):
                        to = T.bind(channels * m.block_stride + row * m.row_stride + at)
                        for (_, column), value in values:
                            inner.epilogue.store(middle, to + column * block, value, block)

                    if inner.depthwise:
                        separable(machine, inner, strip, x, read, constants, finish)
                        return
                    taken = reads(strip, inner.taps, inner.x)
                    with T.serial(inner.product.groups) as group:
                        some = (machine, inner.product, block, strip.pixels, x, read, taken, constants[:4])
                        multiply(*some, group, finish)

                with T.serial(inner.tiles) as tile:
                    by_shape(tile, inner.strips, partial(code, tile=tile))
                with T.serial(m.blocks) as channels:
                    for i in range(m.halo):
                        for column in (i - m.halo, m.columns + i):
                            at = channels * m.block_stride + row * m.row_stride + m.at(0, column)
                            store(middle, at, splat(0.0, block), block)
            with T.Else(), T.serial(m.blocks) as channels, T.serial(m.row_stride // block) as i:
                at = channels * m.block_stride + m.at(0, -m.halo) + row * m.row_stride + i * block
                store(middle, at, splat(0.0, block), block)
