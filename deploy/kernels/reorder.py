"""A map from one layout to another: NCHW and NCHWc, or another halo."""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout
from ..targets import Machine
from .emit import clear_halo, in_turns, kernel, load, over, splat, store, tasks, transpose
from .family import Kernel

CYCLES = 0.6  # a value, between NCHW and NCHWc: a load, a store and four or five shuffles for a vector


@dataclass(frozen=True)
class Reorder(Kernel):
    """Between NCHW and NCHWc, a run of channels x as many pixels at a time are transposed in registers."""

    name = "reorder"
    batch: int
    x: Layout
    y: Layout

    def emit(self, machine: Machine):
        x, y = self.x, self.y
        wide = min(max(x.block, y.block), machine.lanes)  # channels of a run
        runs, tail = -(-x.channels // wide), x.channels % wide

        def body(source, target):
            def begins(side: Layout, image, number, row):
                there = number * wide * side.block_stride if side.block == 1 else side.run(number, wide)
                return T.bind(image * side.size + there + side.at(0, 0) + row * side.row_stride)

            def copy(image, number, row) -> None:
                begin, to = (begins(side, image, number, row) for side in (x, y))
                if x.block == wide:

                    def some(at, width) -> None:
                        store(target, to + at, load(source, begin + at, width), width)

                    over(x.columns * wide, 16, some)
                    return
                with T.serial(x.columns) as i:
                    store(target, to + i * y.block, load(source, begin + i * x.block, wide), wide)

            def exchange(image, number, row, count: int) -> None:  # `count` channels of this run
                begin, to = (begins(side, image, number, row) for side in (x, y))

                def some(at, width) -> None:  # pixels
                    if y.block > 1:
                        read = [load(source, begin + c * x.block_stride + at, width) for c in range(count)]
                        read += [splat(0.0, width)] * (wide - count)
                        if y.block == wide and width > 1:  # the pixels lie without gaps
                            for i, value in enumerate(in_turns(read, width)):
                                store(target, to + at * wide + i * width, value, width)
                            return
                        for i, value in enumerate(transpose(read, width)):
                            store(target, to + (at + i) * y.block, value, wide)
                    else:
                        read = [load(source, begin + (at + i) * x.block, wide) for i in range(width)]
                        for c, value in enumerate(transpose(read, wide)[:count]):
                            store(target, to + c * y.block_stride + at, value, width)

                over(x.columns, machine.lanes if wide > 1 else 1, some)

            count = self.batch * runs * x.rows
            with tasks(machine, count, self.batch * x.channels * x.rows * x.columns) as task:
                row, number = T.bind(task % x.rows), T.bind(task // x.rows % runs)
                image = T.bind(task // x.rows // runs)
                if x.block == y.block:
                    copy(image, number, row)
                elif tail and runs > 1:
                    with T.If(number < runs - 1):
                        with T.Then():
                            exchange(image, number, row, wide)
                        with T.Else():
                            exchange(image, number, row, tail)
                else:
                    exchange(image, number, row, tail or wide)
                if y.block > 1 or x.block == 1:
                    clear_halo(y, target, image * y.size + y.run(number, wide), row == 0, wide)

        buffers = [("x", self.batch * x.size, x.dtype), ("y", self.batch * y.size, y.dtype)]
        return kernel(buffers, body, machine)
