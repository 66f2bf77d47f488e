"""NCHWc kernels that are bound by memory: scale and shift, sums and products of maps, the mean of a map."""

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm import relax
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout
from ..onnx.graph import Affine, Mean
from ..targets import Machine
from .emit import Sums, by_image, clear_halo, kernel, load, pairwise_sum, pick, splat, store, tasks
from .epilogue import Epilogue
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
        shapes = program.graph.shapes
        x, source = program.fetch(node.inputs[0], nchwc=True)
        batch, kinds, arguments, y = shapes[node.output][0], [], [x], program.layout(node.output)
        for value in (node.scale, node.shift):
            if isinstance(value, str) and prod(shapes[value]) == prod(shapes[node.output]):
                argument, kind = program.fetch(value, nchwc=True)
            elif isinstance(value, str):
                argument, kind = program.fetch(value)[0], "images"
            else:
                argument, kind = value, None if value is None else "channels"
            kinds.append(kind)
            arguments += [] if kind is None else [argument.astype(np.float32) if kind == "channels" else argument]
        kernel = cls(batch, source, y, *kinds, Epilogue.of(node))
        return program.call(kernel, arguments, batch * y.size)

    def emit(self, machine: Machine):
        y_at, lanes, rows = self.y, machine.lanes, self.y.rows
        runs = y_at.runs(lanes)

        def body(x, *rest):
            operands, y = list(rest[:-1]), rest[-1]
            kinds = [kind for kind in (self.scale, self.shift) if kind is not None]

            with tasks(machine, self.batch * runs * rows, self.batch * y_at.size / 8) as task:
                number, row = T.bind(task // rows), T.bind(task % rows)
                image, channels = by_image(number, runs, self.batch)

                def at(layout: Layout, column):
                    first = image * layout.size + layout.run(channels, lanes) + layout.at(0, 0)
                    return first + row * layout.row_stride + column * layout.block

                held = [
                    None if isinstance(kind, Layout)
                    else T.bind(_of_channels(buffer, y_at, image if kind == "images" else 0, channels, lanes))
                    for buffer, kind in zip(operands, kinds, strict=True)
                ]  # fmt: skip
                with T.serial(y_at.columns) as column:
                    value = load(x, at(self.x, column), lanes)
                    for index, (buffer, kind) in enumerate(zip(operands, kinds, strict=True)):
                        other = held[index]
                        if isinstance(kind, Layout):
                            other = load(buffer, at(kind, column), lanes)
                        value = value * other if index == 0 and self.scale is not None else value + other
                    self.epilogue.store(y, at(y_at, column), value, lanes)
                clear_halo(y_at, y, image * y_at.size + y_at.run(channels, lanes), row == 0, lanes)

        def operand(name: str, kind) -> tuple[str, int, str]:
            if isinstance(kind, Layout):
                return name, self.batch * kind.size, kind.dtype
            return name, y_at.channels * (self.batch if kind == "images" else 1), "float32"

        operands = (("scale", self.scale), ("shift", self.shift))
        buffers = [operand("x", self.x), *(operand(name, kind) for name, kind in operands if kind is not None)]
        return kernel([*buffers, operand("y", y_at)], body, machine)


def _of_channels(buffer, layout: Layout, image, number, lanes: int):
    """One value a channel of a run. Channels that the last run lacks get values of others: nobody reads them."""
    channels = layout.channels
    first = image * channels + number * lanes
    if channels % lanes == 0:
        return load(buffer, first, lanes)
    missing = -channels % lanes
    last = load(buffer, image * channels + channels - lanes, lanes)
    turned = pick(last, [*range(missing, lanes), *range(missing)], lanes)
    inside = T.min(first, image * channels + channels - lanes)
    return T.Select(T.broadcast(number < layout.runs(lanes) - 1, lanes), load(buffer, inside, lanes), turned)


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
        x, source = program.fetch(node.inputs[0], nchwc=True)
        kernel = cls(program.graph.shapes[node.inputs[0]][0], source, Epilogue.of(node))
        return program.call(kernel, [x], kernel.batch * source.channels)

    def emit(self, machine: Machine):
        x_at, lanes, pixels = self.x, machine.lanes, self.x.rows * self.x.columns
        runs = x_at.runs(lanes)

        def body(x, y):
            with tasks(machine, self.batch * runs, self.batch * x_at.size / 8) as number:
                ways = min(x_at.columns, 8)  # sums side by side hide the latency, and short sums round less
                sums, (image, channels) = Sums(ways, lanes), by_image(number, runs, self.batch)
                first = T.bind(image * x_at.size + x_at.run(channels, lanes) + x_at.at(0, 0))
                for i in range(ways):
                    sums[i] = splat(0.0, lanes)

                def add(row, column, way):
                    sums[way] = sums[way] + load(x, first + row * x_at.row_stride + column * x_at.block, lanes)

                with T.serial(x_at.rows) as row:
                    for column in range(x_at.columns) if x_at.columns <= 16 else ():
                        add(row, column, column % ways)
                    if x_at.columns > 16:
                        with T.serial(x_at.columns) as column:
                            add(row, column, 0)
                total = pairwise_sum([sums[i] for i in range(ways)]) * splat(1 / pixels, lanes)
                value = T.bind(self.epilogue.end(total, y, lanes))
                to = image * x_at.channels + channels * lanes
                tail = x_at.channels % lanes
                if not tail:
                    store(y, to, value, lanes)
                    return
                with T.If(channels < runs - 1):
                    with T.Then():
                        store(y, to, value, lanes)
                    with T.Else():
                        for at, width in pieces(tail, lanes):
                            store(y, to + at, pick(value, range(at, at + width), lanes), width)

        buffers = [("x", self.batch * x_at.size, x_at.dtype), ("y", self.batch * x_at.channels, "float32")]
        return kernel(buffers, body, machine)
