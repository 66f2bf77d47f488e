"""Kernels without arithmetic worth the name: scale and shift, what slices and pads, concatenation."""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..onnx.graph import Activation
from .emit import activate, kernel, load, over, splat, store, tasks


@dataclass(frozen=True)
class Affine:
    """y = act(x * scale + shift). Operands: None, "whole" (as x), or a count of channels, repeated for the images."""

    channels: int  # of all images together
    pixels: int
    scale: str | int | None
    shift: str | int | None
    activation: Activation
    lanes: int


def affine(a: Affine):
    def body(x, *rest):
        operands, y = list(rest[:-1]), rest[-1]
        scale = operands.pop(0) if a.scale is not None else None
        shift = operands.pop(0) if a.shift is not None else None

        def value(buffer, kind, c, at, width):
            return load(buffer, at, width) if kind == "whole" else splat(buffer[c % kind], width)

        def channel(c, pixels):
            def vector(i, width):
                at = c * pixels + i
                result = load(x, at, width)
                if scale is not None:
                    result = result * value(scale, a.scale, c, at, width)
                if shift is not None:
                    result = result + value(shift, a.shift, c, at, width)
                store(y, at, activate(result, a.activation, width), width)

            over(pixels, a.lanes, vector)

        if isinstance(a.scale, int) or isinstance(a.shift, int):
            with tasks(a.channels, a.channels * (10 + a.pixels / 4)) as c:
                channel(c, a.pixels)
        else:
            channel(0, a.channels * a.pixels)

    def size(kind) -> int:
        return a.channels * a.pixels if kind == "whole" else kind

    buffers = [("x", size("whole"), "float32")]
    buffers += [(n, size(k), "float32") for n, k in (("scale", a.scale), ("shift", a.shift)) if k is not None]
    return kernel([*buffers, ("y", size("whole"), "float32")], body)


@dataclass(frozen=True)
class Move:
    """y[i] = x[start + step * i] on every axis, `fill` where that lies outside of x: slices, strided slices, pads."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    fill: float


def move(m: Move):
    def body(x, y):
        def axis(depth: int, read, write, inside: list):
            if depth == len(m.target):
                value = x[read]
                store(y, write, T.if_then_else(_all(inside), value, T.float32(m.fill)) if inside else value, 1)
                return
            start, step, length = m.starts[depth], m.steps[depth], m.source[depth]
            with tasks(m.target[depth], 0 if depth else _product(m.target) * 2) as i:
                at = start + i * step
                tests = [at >= 0] if start < 0 else []
                if start + (m.target[depth] - 1) * step >= length:
                    tests.append(at < length)
                axis(depth + 1, read * length + at, write * m.target[depth] + i, inside + tests)

        axis(0, 0, 0, [])

    buffers = [("x", _product(m.source), "float32"), ("y", _product(m.target), "float32")]
    return kernel(buffers, body)


def _all(conditions: list):
    first, *others = conditions
    for other in others:
        first = T.And(first, other)
    return first


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for length in shape:
        result *= length
    return result


@dataclass(frozen=True)
class Concat:
    outer: int
    runs: tuple[int, ...]  # floats that each input contributes to every outer index
    lanes: int


def concat(c: Concat):
    def body(*buffers):
        *inputs, y = buffers
        with tasks(c.outer, c.outer * sum(c.runs) / 4) as i:
            first = 0
            for x, run in zip(inputs, c.runs, strict=True):

                def copy(at, width, x=x, run=run, first=first):
                    store(y, i * sum(c.runs) + first + at, load(x, i * run + at, width), width)

                over(run, c.lanes, copy)
                first += run

    buffers = [(f"x{n}", c.outer * run, "float32") for n, run in enumerate(c.runs)]
    return kernel([*buffers, ("y", c.outer * sum(c.runs), "float32")], body)
