"""NCHW convolution with pixels in a vector's lanes: group x vectors sums, every vector of x used by all rows."""

from collections.abc import Iterator
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Polyphase
from ..targets import Machine
from .emit import Sums, by_shape, kernel, load, pick, splat
from .family import Schedule, Workload, step_cycles
from .nchw_conv import NCHWConv
from .tiles import Band, plan

MOST_VECTORS = 8  # of pixels a tile; more gain nothing, since each is then used often enough


@dataclass(frozen=True)
class NCHWPixelConv(NCHWConv):
    name = "nchw_pixel_conv"
    tiles_text = "NCHW, {0.group} rows x {0.tile} vectors of pixels"

    @classmethod
    def bands_of(cls, polyphase: Polyphase, width: int, schedule: Schedule, machine: Machine) -> tuple[Band, ...]:
        return plan(polyphase.out_rows, polyphase.out_columns, width, machine.lanes, schedule.tile)

    @classmethod
    def tilings(cls, work: Workload, machine: Machine, groups: list[int]) -> Iterator[tuple[int, int, int]]:
        most = machine.sums_in_flight
        for group in groups:
            for vectors in range(1, min(MOST_VECTORS, machine.accumulators // group) + 1):
                if group * vectors + vectors < machine.registers - 2:
                    unroll = 1
                    while group * vectors * unroll < most and unroll < most:
                        unroll *= 2
                    yield group, vectors, unroll

    @classmethod
    def cycles(cls, work: Workload, schedule: Schedule, m: Machine) -> float:
        rows, columns = work.weight_shape
        group, shape, total = schedule.group, work.polyphase, 0.0
        weights, width = cls.weight_cycles(work, schedule, m), shape.width if shape.needed else shape.columns
        for band in cls.bands_of(shape, width, schedule, m):
            v = len(band.vectors)
            near = columns * v * 4 * m.lanes <= m.core.l1_bytes
            pixels = v * (1 / m.core.loads if near else m.core.l2_line_cycles * 4 * m.lanes / m.core.line_bytes)
            step = step_cycles(m, group * v, group + v + 1, pixels, weights, schedule.unroll)
            stores = group * sum(len(vector.stores) for vector in band.vectors)
            each = columns * schedule.density * step + 30 + stores + group * v * schedule.unroll / 2
            total += len(band.starts) * -(-rows // group) * each
        return total

    def emit(self, machine: Machine):
        group_rows, unroll = self.product.group, self.product.unroll

        def body(x, weight, offset, pointer, bias, tiles, *rest):
            residual, y = rest if self.epilogue.residual else (None, *rest)

            def tile_code(band: Band, image, group, tile):
                read = T.bind(image * self.x_size + tiles[tile * 2])
                write = T.bind((image * self.product.rows + group * group_rows) * self.pixels + tiles[tile * 2 + 1])
                every = [(r, vector) for r in range(group_rows) for vector in band.vectors]
                sums = {(u, r, v): Sums(1, v.lanes) for u in range(unroll) for r, v in every}
                for r, v in every:
                    sums[0, r, v][0] = splat(bias[group * group_rows + r], v.lanes)
                    for u in range(1, unroll):
                        sums[u, r, v][0] = splat(0.0, v.lanes)

                def column(w, o, u):
                    begin = T.bind(read + offset[o])
                    for r, v in every:
                        value = splat(weight[w * group_rows + r], v.lanes) * load(x, begin + v.source, v.lanes)
                        sums[u, r, v][0] = sums[u, r, v][0] + value

                self.product.over_columns(machine, group, 0, pointer, weight, column)
                for r in range(group_rows):
                    with self.if_there(r, group):
                        for vector in band.vectors:
                            total = sums[0, r, vector][0]
                            for u in range(1, unroll):
                                total = total + sums[u, r, vector][0]
                            for s in vector.stores:
                                some = pick(total, range(s.lane, s.lane + s.width), vector.lanes)
                                self.epilogue.store(y, write + r * self.pixels + s.at, some, s.width, residual)

            def task(image, group, tile):
                by_shape(tile, self.bands, lambda band: tile_code(band, image, group, tile))

            self.over_tasks(machine, task)

        return kernel(self.buffers(), body)
