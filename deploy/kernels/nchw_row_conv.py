"""NCHW convolution with rows x pixels in a vector's lanes, rows fastest, as the weights lie.

For maps that are smaller than a vector and need no polyphase split (2x2, 1x1): classifiers and squeeze-excite.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..targets import Machine
from .emit import Sums, kernel, load, pick, splat
from .family import Schedule, Workload, step_cycles, unroll_for
from .nchw_conv import NCHWConv
from .tiles import pieces


def vector_shape(group: int, pixels: int, machine: Machine) -> tuple[int, int]:
    """(rows, pixels) of a vector."""
    high = min(group, machine.lanes)
    return high, 1 << (min(pixels, machine.lanes // high).bit_length() - 1)


@dataclass(frozen=True)
class NCHWRowConv(NCHWConv):
    name = "nchw_row_conv"
    tiles_text = "NCHW, {0.group} rows x all pixels"

    @classmethod
    def stored(cls, machine: Machine) -> str:
        # A classifier is bound by the memory that its weights come from.
        return "bfloat16" if machine.dtype == "bfloat16" else "float32"

    @classmethod
    def fits(cls, work: Workload, machine: Machine) -> bool:
        return not work.polyphase.needed and work.pixels < machine.lanes

    @classmethod
    def tilings(cls, work: Workload, machine: Machine, groups: list[int]) -> Iterator[tuple[int, int, int]]:
        for group in groups:
            high, wide = vector_shape(group, work.pixels, machine)
            sums = group // high * len(pieces(work.pixels, wide))
            if group % high == 0 and sums <= machine.accumulators:
                yield group, 0, unroll_for(sums, machine)

    @classmethod
    def cycles(cls, work: Workload, schedule: Schedule, m: Machine) -> float:
        rows, columns = work.weight_shape
        high, wide = vector_shape(schedule.group, work.pixels, m)
        runs, parts = len(pieces(work.pixels, wide)), schedule.group // high
        shuffles = parts + runs if wide > 1 else 0
        weights = cls.weight_cycles(work, schedule, m)
        step = step_cycles(m, parts * runs, parts + runs + 1 + shuffles / 2, 0, weights, schedule.unroll)
        each = columns * schedule.density * step + 30 + 2 * parts * runs * schedule.unroll
        return -(-rows // schedule.group) * each

    def emit(self, machine: Machine):
        p, epilogue = self.product, self.epilogue
        high, wide = vector_shape(p.group, self.pixels, machine)
        lanes = high * wide
        vectors = [(row, pixel) for row in range(0, p.group, high) for pixel, _ in pieces(self.pixels, wide)]

        def body(x, weight, offset, pointer, bias, tiles, *rest):
            residual, y = rest if epilogue.residual else (None, *rest)

            def task(image, group, tile):
                read = image * self.x_size
                write = T.bind((image * p.rows + group * p.group) * self.pixels)
                sums = Sums(p.unroll * len(vectors), lanes)

                def at(u, v):
                    return u * len(vectors) + v

                def repeated(buffer, start):  # `high` values, once a pixel
                    return pick(load(buffer, start, high), list(range(high)) * wide, high)

                for v, (row, _) in enumerate(vectors):
                    sums[at(0, v)] = repeated(bias, group * p.group + row)
                    for u in range(1, p.unroll):
                        sums[at(u, v)] = splat(0.0, lanes)

                def column(w, o, u):
                    begin = T.bind(read + offset[o])
                    for v, (row, pixel) in enumerate(vectors):
                        some = pick(load(x, begin + pixel, wide), [q for q in range(wide) for _ in range(high)], wide)
                        value = repeated(weight, w * p.group + row) * some
                        sums[at(u, v)] = sums[at(u, v)] + value

                p.over_columns(machine, group, 0, pointer, weight, column)
                for v, (row, pixel) in enumerate(vectors):
                    total = sums[at(0, v)]
                    for u in range(1, p.unroll):
                        total = total + sums[at(u, v)]
                    if wide == self.pixels and p.rows % p.group == 0:  # transposed, the vector is one run of the output
                        turned = pick(total, [q * high + r for r in range(high) for q in range(wide)], lanes)
                        epilogue.store(y, write + row * self.pixels, turned, lanes, residual)
                        continue
                    for r in range(high):
                        with self.if_there(row + r, group):
                            some = pick(total, [q * high + r for q in range(wide)], lanes)
                            epilogue.store(y, write + (row + r) * self.pixels + pixel, some, wide, residual)

            self.over_tasks(machine, task)

        return kernel(self.buffers(), body, machine)
