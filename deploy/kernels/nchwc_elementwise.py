"""NCHWc kernels that are bound by memory: scale and shift, sums and products of maps, the mean of a map."""

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm import relax
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout
from ..onnx.graph import Affine, Mean
from ..targets import Machine
from .emit import Sums, clear_halo, kernel, load, pairwise_sum, pick, splat, store, tasks
from .epilogue import Epilogue, activate
from .family import Caller, Family, Workload
from .nchwc_window import fits_nchwc, wide_enough
from .tiles import pieces


@dataclass(frozen=True)
class NCHWcAffine(Family):
    """y = act(x * scale + shift). Operands: a Layout (as x, perhaps with another halo), "images" or "channels"."""

    name, node, nchwc = "nchwc_affine", Affine, True
    batch: int
    x: Layout
    y: Layout
    scale: Layout | str | None
    shift: Layout | str | None
    epilogue: Epilogue

    @classmethod
    def fits(cls, work: Workload, machine: Machine) -> bool:
        return fits_nchwc(work, machine)

    @classmethod
    def lower(cls, node: Affine, program: Caller) -> relax.Expr:
        shapes, block = program.graph.shapes, program.machine.lanes
        x, source = program.fetch(node.inputs[0], block)
        batch, kinds, arguments, y = shapes[node.output][0], [], [x], program.layout(node.output)
        for value in (node.scale, node.shift):
            if isinstance(value, str) and prod(shapes[value]) == prod(shapes[node.output]):
                argument, kind = program.fetch(value, block)
            elif isinstance(value, str):
                argument, kind = program.fetch(value)[0], "images"
            else:
                argument, kind = value, None if value is None else "channels"
            kinds.append(kind)
            arguments += [] if kind is None else [argument.astype(np.float32) if kind == "channels" else argument]
        kernel = cls(batch, source, y, *kinds, Epilogue(node.activation))
        return program.call(kernel, arguments, batch * y.size)

    def emit(self, machine: Machine):
        y_at, block, rows = self.y, self.y.block, self.y.rows

        def body(x, *rest):
            operands, y = list(rest[:-1]), rest[-1]
            kinds = [kind for kind in (self.scale, self.shift) if kind is not None]

            def at(layout: Layout, number, row, column):
                return number * layout.block_stride + layout.at(0, 0) + row * layout.row_stride + column * block

            with tasks(machine, self.batch * y_at.blocks * rows, self.batch * y_at.size / 8) as task:
                number, row = T.bind(task // rows), T.bind(task % rows)
                image, channels = number // y_at.blocks, number % y_at.blocks
                held = [
                    None if isinstance(kind, Layout)
                    else T.bind(_of_channels(buffer, y_at, image if kind == "images" else 0, channels))
                    for buffer, kind in zip(operands, kinds, strict=True)
                ]  # fmt: skip
                with T.serial(y_at.columns) as column:
                    value = load(x, at(self.x, number, row, column), block)
                    for index, (buffer, kind) in enumerate(zip(operands, kinds, strict=True)):
                        other = held[index]
                        if isinstance(kind, Layout):
                            other = load(buffer, at(kind, number, row, column), block)
                        value = value * other if index == 0 and self.scale is not None else value + other
                    self.epilogue.store(y, at(y_at, number, row, column), value, block)
                clear_halo(y_at, y, number * y_at.block_stride, row == 0)

        def size(kind) -> int:
            if isinstance(kind, Layout):
                return self.batch * kind.size
            return y_at.channels * (self.batch if kind == "images" else 1)

        buffers = [("x", self.batch * self.x.size, "float32")]
        operands = (("scale", self.scale), ("shift", self.shift))
        buffers += [(name, size(kind), "float32") for name, kind in operands if kind is not None]
        return kernel([*buffers, ("y", self.batch * y_at.size, "float32")], body)


def _of_channels(buffer, layout: Layout, image, number):
    """One value a channel of a block. Channels that the last block lacks get values of others: nobody reads them."""
    block, channels = layout.block, layout.channels
    first = image * channels + number * block
    if channels % block == 0:
        return load(buffer, first, block)
    missing = -channels % block
    last = load(buffer, image * channels + channels - block, block)
    turned = pick(last, [*range(missing, block), *range(missing)], block)
    inside = T.min(first, image * channels + channels - block)
    return T.Select(T.broadcast(number < layout.blocks - 1, block), load(buffer, inside, block), turned)


@dataclass(frozen=True)
class NCHWcMean(Family):
    """x to y (images, channels): the mean of every map."""

    name, node, nchwc = "nchwc_mean", Mean, True
    batch: int
    x: Layout
    epilogue: Epilogue

    @classmethod
    def fits(cls, work: Workload, machine: Machine) -> bool:
        return wide_enough(work.x[1], work.x[2] * work.x[3], machine)

    @classmethod
    def lower(cls, node: Mean, program: Caller) -> relax.Expr:
        x, source = program.fetch(node.inputs[0], program.machine.lanes)
        kernel = cls(program.graph.shapes[node.inputs[0]][0], source, Epilogue(node.activation))
        return program.call(kernel, [x], kernel.batch * source.channels)

    def emit(self, machine: Machine):
        x_at, block, pixels = self.x, self.x.block, self.x.rows * self.x.columns

        def body(x, y):
            with tasks(machine, self.batch * x_at.blocks, self.batch * x_at.size / 8) as number:
                ways = min(x_at.columns, 8)  # sums side by side hide the latency, and short sums round less
                sums = Sums(ways, block)
                for i in range(ways):
                    sums[i] = splat(0.0, block)

                def add(row, column, way):
                    at = number * x_at.block_stride + x_at.at(0, 0) + row * x_at.row_stride + column * block
                    sums[way] = sums[way] + load(x, at, block)

                with T.serial(x_at.rows) as row:
                    for column in range(x_at.columns) if x_at.columns <= 16 else ():
                        add(row, column, column % ways)
                    if x_at.columns > 16:
                        with T.serial(x_at.columns) as column:
                            add(row, column, 0)
                total = pairwise_sum([sums[i] for i in range(ways)]) * splat(1 / pixels, block)
                value = T.bind(activate(total, self.epilogue.activation, block))
                first = number // x_at.blocks * x_at.channels + number % x_at.blocks * block
                tail = x_at.channels % block
                if not tail:
                    store(y, first, value, block)
                    return
                with T.If(number % x_at.blocks < x_at.blocks - 1):
                    with T.Then():
                        store(y, first, value, block)
                    with T.Else():
                        for at, width in pieces(tail, block):
                            store(y, first + at, pick(value, range(at, at + width), block), width)

        size = self.batch * x_at.channels
        return kernel([("x", self.batch * x_at.size, "float32"), ("y", size, "float32")], body)
