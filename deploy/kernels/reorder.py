"""A map from one layout to another: NCHW and NCHWc, or another halo."""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout
from ..targets import Machine
from .emit import clear_halo, kernel, load, over, splat, store, tasks, transpose
from .family import Kernel

CYCLES = 0.6  # a value, between NCHW and NCHWc: a load, a store and four or five shuffles for a vector


@dataclass(frozen=True)
class Reorder(Kernel):
    """Between NCHW and NCHWc, a block of channels x as many pixels at a time are transposed in registers."""

    name = "reorder"
    batch: int
    x: Layout
    y: Layout

    def emit(self, machine: Machine):
        x, y = self.x, self.y
        block = max(x.block, y.block)
        blocks, tail = -(-x.channels // block), x.channels % block

        def body(source, target):
            def copy(image, number, row) -> None:
                begin = T.bind(image * x.size + number * x.block_stride + x.at(0, 0) + row * x.row_stride)
                to = T.bind(image * y.size + number * y.block_stride + y.at(0, 0) + row * y.row_stride)

                def some(at, width) -> None:
                    store(target, to + at, load(source, begin + at, width), width)

                over(x.columns * block, 16, some)

            def exchange(image, number, row, count: int) -> None:  # `count` channels of this block
                x_block, y_block = (number * (block // side.block) * side.block_stride for side in (x, y))
                begin = T.bind(image * x.size + x_block + x.at(0, 0) + row * x.row_stride)
                to = T.bind(image * y.size + y_block + y.at(0, 0) + row * y.row_stride)

                def some(at, width) -> None:  # pixels
                    if y.block > 1:
                        read = [load(source, begin + c * x.block_stride + at, width) for c in range(count)]
                        read += [splat(0.0, width)] * (block - count)
                        for i, value in enumerate(transpose(read, width)):
                            store(target, to + (at + i) * block, value, block)
                    else:
                        read = [load(source, begin + (at + i) * block, block) for i in range(width)]
                        for c, value in enumerate(transpose(read, block)[:count]):
                            store(target, to + c * y.block_stride + at, value, width)

                over(x.columns, block, some)

            count = self.batch * blocks * x.rows
            with tasks(machine, count, self.batch * x.channels * x.rows * x.columns) as task:
                row, number = T.bind(task % x.rows), T.bind(task // x.rows % blocks)
                image = T.bind(task // x.rows // blocks)
                if x.block == y.block:
                    copy(image, number, row)
                elif tail and blocks > 1:
                    with T.If(number < blocks - 1):
                        with T.Then():
                            exchange(image, number, row, block)
                        with T.Else():
                            exchange(image, number, row, tail)
                else:
                    exchange(image, number, row, tail or block)
                if y.block > 1 or x.block == 1:
                    clear_halo(y, target, image * y.size + number * y.block_stride, row == 0)

        buffers = [("x", self.batch * x.size, "float32"), ("y", self.batch * y.size, "float32")]
        return kernel(buffers, body)
