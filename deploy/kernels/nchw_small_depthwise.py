"""NCHW depthwise convolution of maps so small that those of several channels fill a vector or two.

Each tap is a shuffle of the maps, times weights that are zero where the tap leaves the map.
"""

from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Polyphase
from ..onnx.graph import Window
from ..targets import Machine
from .emit import kernel, load, tasks
from .epilogue import Epilogue
from .family import Caller, Family, Schedule, Workload
from .nchw_window import NCHWWindow
from .tiles import pieces


def together(p: Polyphase, channels: int, lanes: int) -> int:
    """How many channels to treat at once; 0 if the maps are too large, or would leave lanes empty."""
    before, after = p.rows * p.columns, p.out_rows * p.out_columns
    if after > lanes or after & (after - 1):
        return 0
    most = min(lanes // after, channels)
    while most and most * before > 4 * lanes:
        most //= 2
    return 1 << (most.bit_length() - 1) if most else 0


@dataclass(frozen=True)
class NCHWSmallDepthwise(Family):
    name, node = "nchw_small_depthwise", Window
    batch: int
    channels: int
    pixels: tuple[int, int]  # of an input and of an output map
    together: int  # a power of two
    taps: tuple[tuple[int, ...], ...]  # for each tap and output pixel, the input pixel it reads (any one, if none)
    epilogue: Epilogue

    @classmethod
    def fits(cls, work: Workload, machine: Machine) -> bool:
        return work.node.kind == "conv" and together(work.polyphase, work.x[1], machine.lanes) > 0

    @classmethod
    def cycles(cls, work: Workload, schedule: Schedule, machine: Machine) -> float:
        return NCHWWindow.cycles(work, schedule, machine)  # not fitted on its own

    @classmethod
    def lower(cls, node: Window, program: Caller) -> relax.Expr:
        (x, layout), p = program.fetch(node.inputs[0]), Polyphase.of(program.graph, node)
        batch, channels, after = program.graph.shapes[node.inputs[0]][0], layout.channels, p.out_rows * p.out_columns
        taps, reads = [], []
        for tap, (ky, kx) in enumerate(np.ndindex(*p.taps.kernel)):
            rows = np.arange(p.out_rows)[:, None] * p.taps.stride[0] + ky * p.taps.dilation[0] - p.taps.pad[0]
            columns = np.arange(p.out_columns) * p.taps.stride[1] + kx * p.taps.dilation[1] - p.taps.pad[1]
            inside = ((rows >= 0) & (rows < p.rows) & (columns >= 0) & (columns < p.columns)).reshape(-1)
            if inside.any():
                taps.append(node.weight.reshape(channels, -1)[:, tap, None] * inside)
                reads.append(tuple(np.where(inside, (rows * p.columns + columns).reshape(-1), 0).tolist()))
        count = together(p, channels, program.machine.lanes)
        firsts = np.array([at for at, _ in pieces(channels, count)], np.int32)
        some = firsts[:, None] + np.arange(count)  # (groups, together)
        weights = np.stack(taps, 1)[some].transpose(0, 2, 1, 3)  # (groups, taps, together, pixels)
        biases = np.repeat(node.bias[some], after, axis=1)
        constants = (np.ascontiguousarray(a.reshape(-1), np.float32) for a in (weights, biases))
        kernel = cls(batch, channels, (p.rows * p.columns, after), count, tuple(reads), Epilogue.of(node))
        return program.call(kernel, [x, firsts, *constants], batch * channels * after)

    def emit(self, machine: Machine):
        before, after = self.pixels
        width, runs = self.together * after, pieces(self.together * before, machine.lanes)
        starts = [at for at, _ in pieces(self.channels, self.together)]
        count = self.batch * len(starts)

        def body(x, firsts, weight, bias, y):
            with tasks(machine, count, count * (20 + 2 * len(self.taps))) as task:
                number = T.bind(task % len(starts))
                channel = T.bind(task // len(starts) * self.channels + firsts[number])
                maps = [T.bind(load(x, channel * before + at, lanes)) for at, lanes in runs]
                held = [at + i for at, lanes in runs for i in range(lanes)]
                total = load(bias, number * width, width)
                for tap, read in enumerate(self.taps):
                    chosen = [held.index(c * before + pixel) for c in range(self.together) for pixel in read]
                    some = x[channel * before + read[0]]
                    if width > 1:
                        some = T.Shuffle(maps * -(-width // len(held)), chosen)
                    total = total + load(weight, (number * len(self.taps) + tap) * width, width) * some
                self.epilogue.store(y, channel * after, total, width)

        groups, maps = len(starts), self.batch * self.channels
        buffers = [("x", maps * before, "float32"), ("firsts", groups, "int32")]
        buffers += [("weight", groups * len(self.taps) * width, "float32"), ("bias", groups * width, "float32")]
        return kernel([*buffers, ("y", maps * after, "float32")], body)
