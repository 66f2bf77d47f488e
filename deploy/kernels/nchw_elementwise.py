"""NCHW kernels that are bound by memory: scale and shift, the mean of a map, slices and pads, concatenation."""

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm import relax
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import nchw
from ..onnx.graph import Affine, Concat, Mean, SlicePad
from ..targets import Machine
from .emit import Sums, kernel, load, over, pairwise_sum, splat, store, tasks
from .epilogue import Epilogue
from .family import Caller, Family


@dataclass(frozen=True)
class NCHWAffine(Family):
    """y = act(x * scale + shift). Operands: None, "whole" (as x), or a count of channels, repeated for the images."""

    name, node = "nchw_affine", Affine
    channels: int  # of all images together
    pixels: int
    scale: str | int | None
    shift: str | int | None
    epilogue: Epilogue

    @classmethod
    def lower(cls, node: Affine, program: Caller) -> relax.Expr:
        shapes, operands, arguments = program.graph.shapes, [], [program.fetch(node.inputs[0])[0]]
        batch, channels, rows, columns = nchw(shapes[node.output])
        for value in (node.scale, node.shift):
            if isinstance(value, str):
                operands.append("whole" if prod(shapes[value]) == prod(shapes[node.output]) else batch * channels)
                arguments.append(program.fetch(value)[0])
            else:
                operands.append(None if value is None else channels)
                arguments += [] if value is None else [value.astype(np.float32)]
        kernel = cls(batch * channels, rows * columns, *operands, Epilogue.of(node))
        return program.call(kernel, arguments, kernel.size("whole"))

    def size(self, kind: str | int) -> int:
        return self.channels * self.pixels if kind == "whole" else kind

    def emit(self, machine: Machine):
        def body(x, *rest):
            operands, y = list(rest[:-1]), rest[-1]
            scale = operands.pop(0) if self.scale is not None else None
            shift = operands.pop(0) if self.shift is not None else None

            def value(buffer, kind, c, at, width):
                return load(buffer, at, width) if kind == "whole" else splat(buffer[c % kind], width)

            def channel(c, pixels):
                def vector(i, width):
                    at = c * pixels + i
                    result = load(x, at, width)
                    if scale is not None:
                        result = result * value(scale, self.scale, c, at, width)
                    if shift is not None:
                        result = result + value(shift, self.shift, c, at, width)
                    self.epilogue.store(y, at, result, width)

                over(pixels, machine.lanes, vector)

            if isinstance(self.scale, int) or isinstance(self.shift, int):
                with tasks(machine, self.channels, self.channels * (10 + self.pixels / 4)) as c:
                    channel(c, self.pixels)
            else:
                channel(0, self.channels * self.pixels)

        buffers = [("x", self.size("whole"), "float32")]
        operands = (("scale", self.scale), ("shift", self.shift))
        buffers += [(name, self.size(kind), "float32") for name, kind in operands if kind is not None]
        return kernel([*buffers, ("y", self.size("whole"), "float32")], body)


@dataclass(frozen=True)
class NCHWMean(Family):
    """x (channels, pixels) to y (channels)."""

    name, node = "nchw_mean", Mean
    channels: int  # of all images together
    pixels: int
    epilogue: Epilogue

    @classmethod
    def lower(cls, node: Mean, program: Caller) -> relax.Expr:
        batch, channels, rows, columns = nchw(program.graph.shapes[node.inputs[0]])
        kernel = cls(batch * channels, rows * columns, Epilogue.of(node))
        return program.call(kernel, [program.fetch(node.inputs[0])[0]], batch * channels)

    def emit(self, machine: Machine):
        width = machine.lanes if self.pixels > machine.lanes else 1
        whole = self.pixels // width

        def body(x, y):
            with tasks(machine, self.channels, self.channels * (10 + self.pixels)) as c:
                parts = [x[c * self.pixels + i] for i in range(whole * width if width > 1 else 0, self.pixels)]
                if width > 1:
                    sums = Sums(1, width)
                    sums[0] = load(x, c * self.pixels, width)
                    if whole > 1:
                        with T.serial(whole - 1) as i:
                            more = load(x, c * self.pixels + (i + 1) * width, width)
                            sums[0] = sums[0] + more
                    parts = [sums.buffers[0][i] for i in range(width)] + parts
                self.epilogue.store(y, c, pairwise_sum(parts) * T.float32(1 / self.pixels), 1)

        return kernel([("x", self.channels * self.pixels, "float32"), ("y", self.channels, "float32")], body)


@dataclass(frozen=True)
class NCHWSlicePad(Family):
    """y[i] = x[start + step * i] on every axis, `fill` where that lies outside of x."""

    name, node = "slice_pad", SlicePad
    source: tuple[int, ...]
    target: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    fill: float

    @classmethod
    def lower(cls, node: SlicePad, program: Caller) -> relax.Expr:
        source, target = (program.graph.shapes[name] for name in (node.inputs[0], node.output))
        kernel = cls(source, target, node.starts, node.steps, node.fill)
        return program.call(kernel, [program.fetch(node.inputs[0])[0]], prod(target))

    def emit(self, machine: Machine):
        def body(x, y):
            def axis(depth: int, read, write, inside: list):
                if depth == len(self.target):
                    value = x[read]
                    if inside:
                        first, *others = inside
                        for other in others:
                            first = T.And(first, other)
                        value = T.if_then_else(first, value, T.float32(self.fill))
                    store(y, write, value, 1)
                    return
                start, step, length = self.starts[depth], self.steps[depth], self.source[depth]
                with tasks(machine, self.target[depth], 0 if depth else prod(self.target) * 2) as i:
                    at = start + i * step
                    tests = [at >= 0] if start < 0 else []
                    if start + (self.target[depth] - 1) * step >= length:
                        tests.append(at < length)
                    axis(depth + 1, read * length + at, write * self.target[depth] + i, inside + tests)

            axis(0, 0, 0, [])

        return kernel([("x", prod(self.source), "float32"), ("y", prod(self.target), "float32")], body)


@dataclass(frozen=True)
class NCHWConcat(Family):
    name, node = "concat", Concat
    outer: int
    runs: tuple[int, ...]  # values that each input contributes to every outer index

    @classmethod
    def lower(cls, node: Concat, program: Caller) -> relax.Expr:
        shapes = [program.graph.shapes[name] for name in node.inputs]
        kernel = cls(prod(shapes[0][: node.axis]), tuple(prod(shape[node.axis :]) for shape in shapes))
        inputs = [program.fetch(name)[0] for name in node.inputs]
        return program.call(kernel, inputs, kernel.outer * sum(kernel.runs))

    def emit(self, machine: Machine):
        def body(*buffers):
            *inputs, y = buffers
            with tasks(machine, self.outer, self.outer * sum(self.runs) / 4) as i:
                first = 0
                for x, run in zip(inputs, self.runs, strict=True):

                    def copy(at, width, x=x, run=run, first=first):
                        store(y, i * sum(self.runs) + first + at, load(x, i * run + at, width), width)

                    over(run, machine.lanes, copy)
                    first += run

        buffers = [(f"x{n}", self.outer * run, "float32") for n, run in enumerate(self.runs)]
        return kernel([*buffers, ("y", self.outer * sum(self.runs), "float32")], body)
