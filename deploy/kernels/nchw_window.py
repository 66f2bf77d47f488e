"""NCHW depthwise convolution and pooling: a channel is padded into a scratch, and its taps are shifted reads of it."""

from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Polyphase
from ..onnx.graph import Window
from ..targets import Machine
from .emit import Sums, kernel, load, pick, splat, tasks
from .epilogue import Epilogue
from .family import Caller, Family, Schedule, Workload
from .nchw_conv import starts_of
from .polyphase import split_channel
from .tiles import Band, plan

LOWEST = -3.4028234663852886e38  # what a maximum starts from, and what pads its borders


@dataclass(frozen=True)
class NCHWWindow(Family):
    name, node = "nchw_window", Window
    kind: str  # conv, max, average
    batch: int
    channels: int
    polyphase: Polyphase
    bands: tuple[Band, ...]
    epilogue: Epilogue

    @classmethod
    def cycles(cls, work: Workload, schedule: Schedule, machine: Machine) -> float:
        p = work.polyphase
        return work.x[1] * (50 + 1.1 * p.size * (len(p.offsets) + 6) / machine.lanes)

    @classmethod
    def pack(cls, node: Window, schedule: Schedule, machine: Machine) -> list[np.ndarray]:
        return [np.ascontiguousarray(node.weight.reshape(-1)), node.bias] if node.kind == "conv" else []

    @classmethod
    def lower(cls, node: Window, program: Caller) -> relax.Expr:
        m, p, (x, layout) = program.machine, Polyphase.of(program.graph, node), program.fetch(node.inputs[0])
        bands = plan(p.out_rows, p.out_columns, p.width, m.lanes, m.accumulators // 3)
        batch = program.graph.shapes[node.inputs[0]][0]
        kernel = cls(node.kind, batch, layout.channels, p, bands, Epilogue.of(node))
        arguments = [x, starts_of(bands), *cls.pack(node, program.schedule(node), m)]
        return program.call(kernel, arguments, batch * layout.channels * p.out_rows * p.out_columns)

    def emit(self, machine: Machine):
        p, taps, planes = self.polyphase, len(self.polyphase.offsets), self.batch * self.channels
        fill = LOWEST if self.kind == "max" else 0.0
        pixels = p.out_rows * p.out_columns

        def body(x, starts, *rest):
            y = rest[-1]
            with tasks(machine, planes, planes * (50 + p.size * (taps + 6) / machine.lanes)) as c:
                scratch = T.alloc_buffer((p.size + machine.lanes,), "float32")
                split_channel(p, x, c * (p.rows * p.columns), scratch, 0, fill, machine.lanes)
                channel = T.bind(c % self.channels)

                def tile_code(band: Band, tile):
                    read, write = T.bind(starts[tile * 2]), T.bind(c * pixels + starts[tile * 2 + 1])
                    sums = [Sums(1, v.lanes) for v in band.vectors]
                    for i, v in enumerate(band.vectors):
                        first = rest[1][channel] if self.kind == "conv" else fill
                        sums[i][0] = splat(first, v.lanes)
                    for tap, offset in enumerate(p.offsets):
                        for i, v in enumerate(band.vectors):
                            value, total = load(scratch, read + offset + v.source, v.lanes), sums[i][0]
                            if self.kind == "conv":
                                value = total + splat(rest[0][channel * taps + tap], v.lanes) * value
                            else:
                                value = T.max(total, value) if self.kind == "max" else total + value
                            sums[i][0] = value
                    for i, v in enumerate(band.vectors):
                        total = sums[i][0]
                        if self.kind == "average":
                            total = total * splat(1 / taps, v.lanes)
                        for s in v.stores:
                            some = pick(total, range(s.lane, s.lane + s.width), v.lanes)
                            self.epilogue.store(y, write + s.at, some, s.width)

                first = 0
                for band in self.bands:
                    if len(band.starts) == 1:
                        tile_code(band, first)
                    else:
                        with T.serial(len(band.starts)) as tile:
                            tile_code(band, first + tile)
                    first += len(band.starts)

        tiles = sum(len(band.starts) for band in self.bands)
        buffers = [("x", planes * p.rows * p.columns, "float32"), ("tiles", 2 * tiles, "int32")]
        if self.kind == "conv":
            buffers += [("weight", self.channels * taps, "float32"), ("bias", self.channels, "float32")]
        return kernel([*buffers, ("y", planes * pixels, "float32")], body)
