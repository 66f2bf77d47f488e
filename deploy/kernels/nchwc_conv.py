"""NCHWc convolution, alone or with the layers in front of it: lanes are output channels.

Each column multiplies broadcast pixels of a tile with vectors of weights. In front of a pointwise convolution there may
be a depthwise one, whose tile goes into a scratch that stays in the cache. In front of that may be a pointwise one
again, the expansion of an inverted residual (which may have a depthwise one in front, too): it is computed for a band
of rows at a time, so that its wide output never leaves the second cache. Rows at the edges of a band are computed
twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tvm import relax
from tvm.script.ir_builder import tirx as T

from ..onnx.blocks import Pattern
from ..onnx.geometry import Layout, Polyphase, Taps
from ..onnx.graph import Conv, Grid
from ..targets import Machine
from .emit import by_shape, clear_halo, kernel, prefetch, scratch, tasks
from .epilogue import Epilogue, in_steps
from .family import Caller, ConvFamily, Expansion, Schedule, Workload, dot_of, unroll_for
from .gather import Gather, chunk_of
from .gather import columns_of as gathered_columns
from .gather import cycles as gather_cycles
from .instructions import STEPS
from .nchwc_tile import expand_rows, multiply, separable
from .nchwc_window import pack_depthwise, tap_cycles, wide_enough
from .product import Product, columns_of, pack
from .tiles import Strip, strips


def _by_name(buffers: list[tuple], arguments, prefix: str = "") -> dict:
    return {name.removeprefix(prefix): buffer for (name, _, _), buffer in zip(buffers, arguments, strict=False)}


@dataclass(frozen=True)
class NCHWcConv(ConvFamily):
    name, nchwc = "nchwc_conv", True
    tiles_text = "NCHWc, {0.group} rows x {0.tile} pixels"

    batch: int
    x: Layout  # what the kernel reads; behind an expansion, the layout that its output would have in memory
    y: Layout
    taps: Taps
    strips: tuple[Strip, ...]  # tiles of y, or of a band of it
    product: Product
    epilogue: Epilogue
    depthwise: tuple[Taps, Epilogue] | None = None  # in front of the pointwise convolution
    near: Layout | None = None  # the scratch that it writes
    expand: "NCHWcConv | None" = None  # in front of that; its y is a band, its tiles are those of a row
    gather: Gather | None = None  # of single channels of a sparse layer
    chunk: int = 1  # groups of rows that a task computes
    band: int = 0  # rows of y computed together behind an expansion
    residual: Layout | None = None
    rows_first: bool = False  # neighbouring tasks share rows (and weights), not pixels
    cycles_in_all: int = 0  # about what it takes on one thread

    @classmethod
    def fits(cls, work: Workload, machine: Machine) -> bool:
        _, channels, rows, columns = work.x  # the first layer's pictures have few channels
        whole = rows * columns > 1 and (work.node.depthwise is None or channels >= machine.lanes)
        return whole and wide_enough(work.y[1], work.pixels, machine)

    @classmethod
    def dot(cls, work: Workload, machine: Machine) -> int:
        return work.dot(machine)

    @classmethod
    def dense_groups(cls, work: Workload, machine: Machine) -> list[int]:
        return [vectors * machine.lanes for vectors in (1, 2, 3, 4)]

    @classmethod
    def tilings(cls, work: Workload, machine: Machine, groups: list[int]) -> Iterator[tuple[int, int, int]]:
        registers = machine.registers
        for v in (group // machine.lanes for group in groups if group % machine.lanes == 0):
            # Broadcast from memory if used once; else the compiler wants some registers more, or it spills sums.
            most = (registers - 2) if v == 1 else (registers - 2 * v - 2) // v
            # 28 and 24 sums leave 32 registers some room, 14 suit maps of 14 or 7 columns, the last whole rows.
            sizes = {min(most, 28 // v), min(most, 24 // v), 14 // v, most - most % work.y[3]}
            for pixels in sorted(sizes - {0}):
                yield v * machine.lanes, pixels, unroll_for(min(pixels, work.pixels) * v, machine)

    @classmethod
    def candidates(cls, work: Workload, machine: Machine, pattern: Pattern | None) -> Iterator[Schedule]:
        for schedule in super().candidates(work, machine, pattern):
            yield schedule
            if schedule.sparse and work.dot(machine) > 1 and work.x[1] * work.itemsize(machine) > 2 * machine.lanes:
                # About: where some taps of a channel are zero, all of them are gathered.
                half = replace(schedule, gather=True, density=pattern.density)
                yield replace(half, cycles=cls.cycles(work, half, machine) + gather_cycles(work, half, machine))

    @classmethod
    def cycles(cls, work: Workload, schedule: Schedule, m: Machine) -> float:
        rows, columns = len(work.node.weight), work.columns(work.dot(m))
        v, total, count = schedule.group // m.lanes, 0.0, 0
        for strip in strips(work.y[2], work.y[3], schedule.tile):
            pixels, core = len(strip.pixels), m.core
            loads = core.load_cycles * (v + pixels + 1)
            step = max(v * pixels / core.multiply_adds, loads, core.latency / schedule.unroll)
            each = columns * schedule.density * step + 30 + v * pixels * (1 + schedule.unroll / 2)
            total += len(strip.starts) * each
            count += len(strip.starts)
        # With a depthwise convolution in front a task is a tile with all its rows, and threads wait for the last tile.
        idle = -(-count // m.threads) * m.threads / count if work.node.depthwise else 1.0
        return -(-rows // schedule.group) * total * idle

    @classmethod
    def prologue_cycles(cls, work: Workload, machine: Machine) -> float:
        if not work.node.depthwise:
            return 0.0
        vectors = -(-work.x[1] // machine.lanes) * work.pixels
        return vectors * tap_cycles(Taps.of(work.node.depthwise), machine)

    @classmethod
    def lower(cls, node: Conv, program: Caller) -> relax.Expr:
        y, added = program.layout(node.output), [program.fetch(name, nchwc=True) for name in node.inputs[1:]]
        residual, expansion = added[0][1] if added else None, program.expansion(node)
        read_by = expansion.node if expansion else node
        halo = Polyphase.of(program.graph, read_by.depthwise or read_by).halo
        x, source = program.fetch(read_by.inputs[0], True, halo)
        if expansion is None:
            conv, constants = cls.of(node, program, source, y, residual=residual)
            layers = (node,)
        else:
            inner, wider = cls.of_expansion(node, expansion, program, source)
            wide = program.layout(expansion.node.output)
            fused = {"residual": residual, "expand": inner, "band": expansion.band}
            conv, own = cls.of(node, program, wide, y, expansion.band, **fused)
            conv = replace(conv, cycles_in_all=conv.cycles_in_all + inner.cycles_in_all)
            constants, layers = [*own, *wider], (expansion.node, node)
        arguments = [x, *constants, *(value for value, _ in added)]
        return program.call(conv, arguments, conv.batch * y.size, layers)

    @classmethod
    def of_expansion(cls, node: Conv, expansion: Expansion, program: Caller, source: Layout):
        """The kernel of the expansion in front of `node`, which is emitted inside of that, and its constants."""
        wide, taps = program.layout(expansion.node.output), Taps.of(node.depthwise)
        high = (expansion.band - 1) * taps.stride[0] + taps.kernel[0]
        band = replace(wide, rows=high, halo=taps.pad[1])
        return cls.of(expansion.node, program, source, band, 1)

    @classmethod
    def of(cls, node: Conv, program: Caller, x: Layout, y: Layout, rows: int | None = None, **more):
        """The kernel of a convolution from x to y whose tiles are of `rows` rows together, and its constants."""
        schedule, m = program.schedule(node), program.machine
        dot = dot_of(program.graph, node, m)
        batch, tiles = program.graph.shapes[node.output][0], strips(rows or y.rows, y.columns, schedule.tile)
        empty = Product(len(node.weight), schedule.group, 0, schedule.sparse, schedule.unroll)
        (y, epilogue, unit), dtype, depthwise, first = in_steps(node, y), x.dtype, None, []
        if node.depthwise:
            pixels, channels = max(len(strip.pixels) for strip in tiles), node.weight.shape[1]
            near = program.nchwc(channels, 1, pixels, dtype := program.number(node.depthwise.grid))
            more["near"], *way, step = in_steps(node.depthwise, near)
            depthwise, first = (Taps.of(node.depthwise), *way), pack_depthwise(node.depthwise, m.lanes, x.dtype, step)
        if isinstance(x.dtype, Grid) and (dot == 4 or node.depthwise):
            x = replace(x, dtype=STEPS)
        conv = cls(
            batch, x, y, Taps.of(node), tiles, empty, epilogue,
            depthwise, cycles_in_all=round(batch * schedule.cycles), **more,
        )  # fmt: skip
        channels = [conv.columns_in.channel(c) for c in range(0, node.weight.shape[1], dot)]
        offsets = (np.array(channels)[:, None] + np.array(conv.taps.offsets(conv.columns_in))).reshape(-1)
        pattern, arrays = program.pattern(node), []
        if schedule.gather:
            taps, there = Taps() if node.depthwise else conv.taps, conv.columns_in
            some, columns, arrays = gathered_columns(node, pattern, schedule, offsets, there, taps, tiles, dot)
            conv = replace(conv, gather=some, chunk=chunk_of(some.groups, batch * conv.tiles, m))
        else:
            columns = columns_of(node, pattern, schedule, offsets, dot)
        weights, grid = {1: ("float32", None), 2: ("bfloat16", None), 4: ("int8", dtype)}[dot]
        product, packed = pack(node, schedule, columns, weights, 2 if schedule.gather else 1, grid, unit)
        conv = replace(conv, product=product, rows_first=packed[0].nbytes > m.itemsize * x.size)
        return conv, [*packed, np.array(conv.starts(), np.int32), *first, *arrays]

    @property
    def tiles(self) -> int:
        return sum(len(strip.starts) for strip in self.strips)

    @property
    def middle(self) -> Layout:
        """What the depthwise convolution reads: x, or a band of the expansion's output."""
        return self.expand.y if self.expand else self.x

    @property
    def columns_in(self) -> Layout:
        """Where the columns' offsets lead: into x, or into the scratch that the depthwise convolution writes."""
        if self.depthwise is None:
            return self.x
        return self.near

    def starts(self) -> list[int]:
        """For every tile (of a band), where it is read, written, and where its residual lies."""
        taps = self.taps if self.depthwise is None else self.depthwise[0]
        every = [start for strip in self.strips for start in strip.starts]
        residual, middle = self.residual or self.y, self.middle
        # A band of the expansion begins with the rows above it, where a map has its padding.
        above = taps.pad[0] if self.expand else 0
        first = [(row * taps.stride[0] - taps.pad[0] + above, at * taps.stride[1] - taps.pad[1]) for row, at in every]
        read = [middle.at(row, column) for row, column in first]
        return [n for at, s in zip(read, every, strict=True) for n in (at, self.y.at(*s), residual.at(*s))]

    def constants(self, lanes: int, prefix: str = "") -> list[tuple[str, int, str]]:
        """Its buffers beside the maps: weights, and where the tiles begin."""
        buffers = [*self.product.buffers(prefix), (f"{prefix}tiles", 3 * self.tiles, "int32")]
        if self.depthwise is not None:
            channels, (high, wide) = self.middle.runs(lanes) * lanes, self.depthwise[0].kernel
            buffers.append((f"{prefix}depthwise", channels * high * wide, "float32"))
            buffers.append((f"{prefix}depthwise_bias", channels, "float32"))
        if self.gather is not None:
            buffers += self.gather.buffers(prefix)
        return buffers

    def emit(self, machine: Machine):
        lanes, product, y_at = machine.lanes, self.product, self.y
        mine, wide = self.constants(lanes), self.expand.constants(lanes, "expand_") if self.expand else []

        def body(x, *rest):
            own, wider = _by_name(mine, rest), _by_name(wide, rest[len(mine) :], "expand_")
            residual, tiles, y = rest[-2] if self.residual else None, own["tiles"], rest[-1]

            def put(strip: Strip, image, write, residual_at, edge, number, values) -> None:
                """Store pixels of run `number` of y from `write` on; their residual lies from `residual_at` on."""
                to = T.bind(image * y_at.size + y_at.run(number, lanes))
                if residual is not None:
                    there = self.residual
                    other = T.bind(image * there.size + there.run(number, lanes) + residual_at)
                for (row, column), value in zip(strip.pixels, values, strict=True):
                    from_residual = residual is not None and other + row * there.row_stride + column * there.block
                    at = to + write + row * y_at.row_stride + column * y_at.block
                    self.epilogue.store(y, at, value, lanes, residual, from_residual)
                clear_halo(y_at, y, to, edge, lanes)  # after the sums have left their registers

            def fetch_residual(image, groups, pixels, residual_at) -> None:
                """Fetch what a tile will add: it was made some layers ago."""
                there, (first, count) = self.residual, groups
                for v in range(count * product.group // lanes):
                    other = image * there.size + there.run(first * (product.group // lanes) + v, lanes)
                    for row, column in pixels:
                        prefetch(residual, other + residual_at + row * there.row_stride + column * there.block)

            def tile_code(strip: Strip, image, groups, source, read, write, residual_at, edge) -> None:
                finish = partial(put, strip, image, write, residual_at, edge)
                if self.depthwise is None:
                    if residual is not None and groups[1] == 1:
                        fetch_residual(image, groups, strip.pixels, residual_at)
                    multiply(machine, self, strip, x, read, own, groups, finish)
                else:
                    separable(machine, self, strip, source, read, own, finish)

            def alone(image, tile, groups) -> None:
                read, write, residual_at = (T.bind(tiles[tile * 3 + i]) for i in range(3))
                read = T.bind(image * self.x.size + read)
                some = (image, groups, x, read, write, residual_at, tile == 0)
                by_shape(tile, self.strips, lambda strip: tile_code(strip, *some))

            if self.expand is not None:
                bands = y_at.rows // self.band
                residual_band = self.band * self.residual.row_stride if self.residual else 0
                with tasks(machine, self.batch * bands, self.cycles_in_all) as number:
                    image, band = T.bind(number // bands), T.bind(number % bands)
                    middle = scratch(self.middle)
                    expand_rows(machine, self, x, image, band, middle, wider)
                    with T.serial(self.tiles) as tile:
                        read, write, residual_at = (T.bind(tiles[tile * 3 + i]) for i in range(3))
                        write = T.bind(write + band * (self.band * y_at.row_stride))
                        residual_at = T.bind(residual_at + band * residual_band)
                        edge = T.And(tile == 0, band == 0)
                        some = (image, None, middle, read, write, residual_at, edge)
                        by_shape(tile, self.strips, lambda strip: tile_code(strip, *some))
            elif self.depthwise is not None:
                with tasks(machine, self.batch * self.tiles, self.cycles_in_all) as number:
                    alone(T.bind(number // self.tiles), T.bind(number % self.tiles), None)
            else:
                groups = product.groups // self.chunk
                inner = self.tiles if self.rows_first else groups
                with tasks(machine, self.batch * self.tiles * groups, self.cycles_in_all) as number:
                    a, b = T.bind(number % inner), T.bind(number // inner % (self.tiles * groups // inner))
                    image = T.bind(number // (self.tiles * groups)) if self.batch > 1 else 0
                    tile, group = (a, b) if self.rows_first else (b, a)
                    alone(image, tile, (group * self.chunk, self.chunk))

        x_at = (self.expand or self).x
        buffers = [("x", self.batch * x_at.size, x_at.dtype), *mine, *wide]
        if self.residual is not None:
            buffers.append(("residual", self.batch * self.residual.size, self.residual.dtype))
        return kernel([*buffers, ("y", self.batch * y_at.size, y_at.dtype)], body, machine)
