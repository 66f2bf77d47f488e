"""The convolution whose maps lie in blocks of channels, alone or with the layers in front of it.

A tile of a few pixels is computed at a time:

    y[row, pixel r] = act(bias[row] + sum over k of x[offset[k] + pixel r] * weight[k, row]  (+ residual))

where k runs over the columns that the row's group keeps. A group is one or more blocks of rows, so lanes are rows, and
each column multiplies broadcast pixels with vectors of weights.

In front of a pointwise convolution there may be a depthwise one, whose tile goes into a scratch that stays in the
cache; and in front of that a pointwise one again (an inverted residual; it may have a depthwise one in front, too),
computed for a band of rows at a time, so that its wide output never leaves the second cache. Rows at the edges of a
band are then computed twice.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import POINT, Map, Taps
from ..onnx.graph import Activation
from .emit import Sums, activate, branch, columns, kernel, load, prefetch, splat, store, tasks
from .nchwc import clear_border
from .tiles import Strip, deal


@dataclass(frozen=True)
class Product:
    """The weights of a convolution, as they are packed."""

    rows: int
    group: int  # rows that share their columns
    columns: int  # kept columns a group if dense, of all groups together if sparse; a multiple of `unroll`
    sparse: bool
    unroll: int  # columns a step, each with its own sums: hides the latency of few accumulators
    activation: Activation

    @property
    def groups(self) -> int:
        return -(-self.rows // self.group)

    def buffers(self, name: str) -> list[tuple[str, int, str]]:
        steps = self.columns * (1 if self.sparse else self.groups)
        return [
            (f"{name}weight", max(1, steps) * self.group, "float32"),
            (f"{name}offset", max(1, self.columns), "int32"),
            (f"{name}pointer", self.groups + 1, "int32"),
            (f"{name}bias", self.groups * self.group, "float32"),
        ]


@dataclass(frozen=True)
class LaneGemm:
    """The geometry of a convolution; layers that agree in it share the kernel."""

    batch: int
    x: Map  # what the expansion would write if it were not inside
    y: Map
    taps: Taps
    strips: tuple[Strip, ...]  # tiles of y, or of a band of it
    product: Product
    depthwise: tuple[Taps, Activation] | None = None  # in front of the pointwise convolution
    expand: "LaneGemm | None" = None  # in front of that; its y is a band, its tiles are those of a row
    band: int = 0  # rows of y computed together behind an expansion
    residual: Map | None = None
    rows_first: bool = False  # neighbouring tasks share rows (and weights), not pixels
    cycles: float = 1e9

    @property
    def lanes(self) -> int:
        return self.y.lanes

    @property
    def tiles(self) -> int:
        return sum(len(strip.starts) for strip in self.strips)

    @property
    def middle(self) -> Map:
        """What the depthwise convolution reads: x, or a band of the expansion's output."""
        return self.expand.y if self.expand else self.x

    @property
    def source(self) -> Map:
        """What the columns' offsets refer to."""
        if self.depthwise is None:
            return self.x
        return Map(self.middle.channels, 1, max(len(strip.pixels) for strip in self.strips), self.lanes)

    def starts(self) -> list[int]:
        """For every tile (of a band), where it is read, written, and where its residual lies."""
        taps = self.taps if self.depthwise is None else self.depthwise[0]
        every = [start for strip in self.strips for start in strip.starts]
        residual, middle = self.residual or self.y, self.middle
        # A band of the expansion begins with the rows above it, where a map has its padding.
        down = taps.pad[0] if self.expand else 0
        first = [
            (row * taps.stride[0] - taps.pad[0] + down, column * taps.stride[1] - taps.pad[1]) for row, column in every
        ]
        reads = [middle.at(row, column) for row, column in first]
        return [n for at, s in zip(reads, every, strict=True) for n in (at, self.y.at(*s), residual.at(*s))]

    def constants(self, name: str) -> list[tuple[str, int, str]]:
        """Its buffers beside the maps: weights, and where the tiles begin."""
        buffers = [*self.product.buffers(name), (f"{name}tiles", 3 * self.tiles, "int32")]
        if self.depthwise is not None:
            blocks, (high, wide) = self.middle.blocks, self.depthwise[0].kernel
            buffers.append((f"{name}first", blocks * high * wide * self.lanes, "float32"))
            buffers.append((f"{name}first_bias", blocks * self.lanes, "float32"))
        return buffers


def lane_gemm(g: LaneGemm):
    lanes, product = g.lanes, g.product
    mine, wide = g.constants(""), g.expand.constants("wider_") if g.expand else []

    def body(x, *rest):
        own, wider, y = rest[: len(mine)], rest[len(mine) :][: len(wide)], rest[-1]
        residual, tiles = rest[-2] if g.residual else None, own[4]

        def put(image, block, down, beside, edge, values) -> None:
            """Store pixels of one block of y, `down` (and `beside`) floats behind its begin."""
            to = T.bind((image * g.y.blocks + block) * g.y.block)
            if residual is not None:
                other = T.bind((image * g.y.blocks + block) * g.residual.block + beside)
            for (row, column), value in values:
                if residual is not None:
                    value = value + load(residual, other + row * g.residual.pitch + column * lanes, lanes)
                value = activate(value, product.activation, lanes)
                store(y, to + down + row * g.y.pitch + column * lanes, value, lanes)
            clear_border(g.y, y, to, edge)  # after the sums have left their registers

        def near(image, group, pixels, beside) -> None:
            """Fetch what a tile will add: it was made some layers ago."""
            for v in range(product.group // lanes):
                other = (image * g.y.blocks + group * (product.group // lanes) + v) * g.residual.block
                for row, column in pixels:
                    prefetch(residual, other + beside + row * g.residual.pitch + column * lanes)

        def tile_code(strip: Strip, image, group, middle, read, down, beside, edge) -> None:
            finish = partial(put, image, down=down, beside=beside, edge=edge)
            if g.depthwise is None:
                if residual is not None:
                    near(image, group, strip.pixels, beside)
                multiply(product, lanes, strip.pixels, x, read, _reads(strip, g.taps, g.x), own[:4], group, finish)
            else:
                _separable(g, strip, middle, read, own, finish)

        def alone(image, tile, group) -> None:
            read, down, beside = (T.bind(tiles[tile * 3 + i]) for i in range(3))
            read = T.bind(image * g.x.size + read)
            _every_tile(g, tile, lambda s: tile_code(s, image, group, x, read, down, beside, tile == 0))

        if g.expand is not None:
            bands = g.y.rows // g.band
            with tasks(g.batch * bands, g.cycles) as number:
                image, band = T.bind(number // bands), T.bind(number % bands)
                middle = T.alloc_buffer((g.middle.size,), "float32")
                _expand(g, x, image, band, middle, wider)
                with T.serial(g.tiles) as tile:
                    read, down, beside = (T.bind(tiles[tile * 3 + i]) for i in range(3))
                    down = T.bind(down + band * (g.band * g.y.pitch))
                    beside = T.bind(beside + band * (g.band * g.residual.pitch if g.residual else 0))
                    edge = T.And(tile == 0, band == 0)
                    _every_tile(g, tile, lambda s: tile_code(s, image, None, middle, read, down, beside, edge))
        elif g.depthwise is not None:
            with tasks(g.batch * g.tiles, g.cycles) as number:
                alone(T.bind(number // g.tiles), T.bind(number % g.tiles), None)
        else:
            inner, groups = g.tiles if g.rows_first else product.groups, product.groups
            with tasks(g.batch * g.tiles * groups, g.cycles) as number:
                a, b = T.bind(number % inner), T.bind(number // inner % (g.tiles * groups // inner))
                image = T.bind(number // (g.tiles * groups)) if g.batch > 1 else 0
                alone(image, *((a, b) if g.rows_first else (b, a)))

    buffers = [("x", g.batch * (g.expand or g).x.size, "float32"), *mine, *wide]
    if g.residual is not None:
        buffers.append(("residual", g.batch * g.residual.size, "float32"))
    return kernel([*buffers, ("y", g.batch * g.y.size, "float32")], body)


def _every_tile(g: LaneGemm, tile, code: Callable) -> None:
    """Emit `code(strip)` for the strip that the tile belongs to."""
    ends, bodies = [], []
    for strip in g.strips:
        ends.append((ends[-1] if ends else 0) + len(strip.starts))
        bodies.append(partial(code, strip))
    branch(tile, ends, bodies)


def _reads(strip: Strip, taps: Taps, x: Map) -> list[int]:
    """Where the pixels of a tile are read, from its first."""
    return [row * taps.stride[0] * x.pitch + column * taps.stride[1] * x.lanes for row, column in strip.pixels]


def multiply(product: Product, lanes: int, pixels, x, read, taken, constants, group, finish: Callable) -> None:
    """One group of rows of a tile; `finish(block, values=[(pixel, value), ...])` stores a block of it."""
    weight, offset, pointer, bias = constants
    vectors, count, unroll = product.group // lanes, len(pixels), product.unroll
    sums = Sums(unroll * vectors * count, lanes)
    every = [(v, r) for r in range(count) for v in range(vectors)]

    def at(u, v, r):
        return (u * vectors + v) * count + r

    for v, r in every:
        sums[at(0, v, r)] = load(bias, group * product.group + v * lanes, lanes)
        for u in range(1, unroll):
            sums[at(u, v, r)] = splat(0.0, lanes)

    def column(w, o, u):
        start = T.bind(read + offset[o])
        for v, r in every:
            value = splat(x[start + taken[r]], lanes) * load(weight, w * product.group + v * lanes, lanes)
            sums[at(u, v, r)] = sums[at(u, v, r)] + value

    columns(product, group, pointer, weight, column)

    def total(v: int, r: int):
        value = sums[at(0, v, r)]
        for u in range(1, unroll):
            value = value + sums[at(u, v, r)]
        return value

    full = -(-product.rows // lanes) - (product.groups - 1) * vectors  # blocks of the last group
    for v in range(vectors):
        with T.If(group < product.groups - 1) if v >= full else nullcontext(), T.Then() if v >= full else nullcontext():
            finish(group * vectors + v, values=[(pixel, total(v, r)) for r, pixel in enumerate(pixels)])


def slide(g: LaneGemm, strip: Strip, x, read, weight, bias, block, scratch, write) -> None:
    """One block of channels of a tile of the depthwise convolution, into the scratch."""
    taps, activation = g.depthwise
    lanes, offsets = g.lanes, taps.offsets(g.middle)
    for some in deal(list(zip(range(len(strip.pixels)), _reads(strip, taps, g.middle), strict=True)), 14):
        sums = Sums(len(some), lanes)
        for i in range(len(some)):
            sums[i] = load(bias, block * lanes, lanes)
        for tap, offset in enumerate(offsets):
            for i, (_, taken) in enumerate(some):
                value = load(x, read + offset + taken, lanes)
                value = value * load(weight, (block * len(offsets) + tap) * lanes, lanes)
                sums[i] = sums[i] + value
        for i, (r, _) in enumerate(some):
            store(scratch, write + r * lanes, activate(sums[i], activation, lanes), lanes)


def _separable(g: LaneGemm, strip: Strip, x, read, constants, finish: Callable) -> None:
    """All rows of a tile of a pointwise convolution, with the depthwise one in front of it."""
    *constants, _, weight, bias = constants
    scratch = T.alloc_buffer((g.source.size,), "float32")
    with T.serial(g.middle.blocks) as block:
        at = read + block * g.middle.block
        slide(g, strip, x, at, weight, bias, block, scratch, block * g.source.block)
    with T.serial(g.product.groups) as group:
        taken = [r * g.lanes for r in range(len(strip.pixels))]
        multiply(g.product, g.lanes, strip.pixels, scratch, 0, taken, constants, group, finish)


def _expand(g: LaneGemm, x, image, band, middle, constants) -> None:
    """The rows of the expansion that a band needs: zeros where they lie outside of the map."""
    inner, taps, m, lanes = g.expand, g.depthwise[0], g.middle, g.lanes
    source = inner.depthwise[0] if inner.depthwise else POINT
    with T.serial(m.rows) as row:
        number = T.bind(band * (g.band * taps.stride[0]) + row - taps.pad[0])
        with T.If(T.And(number >= 0, number < g.x.rows)):
            with T.Then():

                def code(strip: Strip, tile) -> None:
                    read, at = (T.bind(constants[4][tile * 3 + i]) for i in range(2))
                    read = T.bind(image * inner.x.size + number * (source.stride[0] * inner.x.pitch) + read)

                    def finish(block, values):
                        to = T.bind(block * m.block + row * m.pitch + at)
                        for (_, column), value in values:
                            value = activate(value, inner.product.activation, lanes)
                            store(middle, to + column * lanes, value, lanes)

                    if inner.depthwise:
                        _separable(inner, strip, x, read, constants, finish)
                        return
                    taken = _reads(strip, POINT, inner.x)
                    with T.serial(inner.product.groups) as group:
                        multiply(inner.product, lanes, strip.pixels, x, read, taken, constants[:4], group, finish)

                with T.serial(inner.tiles) as tile:
                    _every_tile(inner, tile, partial(code, tile=tile))
                with T.serial(m.blocks) as block:
                    for i in range(m.border):
                        for column in (i - m.border, m.columns + i):
                            store(middle, block * m.block + row * m.pitch + m.at(0, column), splat(0.0, lanes), lanes)
            with T.Else(), T.serial(m.blocks) as block, T.serial(m.pitch // lanes) as i:
                store(
                    middle, block * m.block + m.at(0, -m.border) + row * m.pitch + i * lanes, splat(0.0, lanes), lanes
                )
