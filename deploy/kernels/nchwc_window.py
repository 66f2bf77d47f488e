"""NCHWc depthwise convolution and pooling: every tap is a vector of channels."""

from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout, Polyphase, Taps, nchw
from ..onnx.graph import Grid, Window
from ..targets import Machine
from .emit import Sums, by_image, by_shape, clear_halo, kernel, load, splat, tasks
from .epilogue import Epilogue, in_steps
from .family import Caller, Family, Schedule, Workload
from .instructions import as_steps
from .tiles import Strip, strips


def wide_enough(channels: int, pixels: int, machine: Machine) -> bool:
    """Whether a map fills blocks of channels, and is one."""
    return channels >= machine.lanes and pixels > 1


def fits_nchwc(work: Workload, machine: Machine) -> bool:
    """Whether a node's input and output are maps that fill blocks of channels."""
    return all(wide_enough(c, rows * columns, machine) for _, c, rows, columns in (work.x, work.y))


def tap_cycles(taps: Taps, machine: Machine) -> float:
    """Of one vector of an output; strides fetch more pixels for each from the second cache."""
    core = machine.core
    fetched = (taps.stride[0] * taps.stride[1] - 1) * core.l2_line_cycles
    return max(core.load_cycles, 1 / core.multiply_adds) * taps.kernel[0] * taps.kernel[1] + 2 + fetched


def pack_depthwise(node: Window, lanes: int, dtype: str | Grid, unit: float = 1.0) -> list[np.ndarray]:
    """Weights (runs, taps, lanes) and biases (runs, lanes), flat; channels that the last run lacks are zero.

    dtype: of the map; of one on a grid, steps are multiplied. unit: of what comes out.
    """
    channels, weight, bias = len(node.weight), node.weight.reshape(len(node.weight), -1) / unit, node.bias / unit
    if isinstance(dtype, Grid):
        weight = weight * dtype.scale
        bias = bias - dtype.zero * weight.sum(1)
    extra = -channels % lanes
    weight = np.pad(weight, ((0, extra), (0, 0)))
    weight = weight.reshape(-1, lanes, weight.shape[1]).transpose(0, 2, 1)
    return [np.ascontiguousarray(a.reshape(-1), np.float32) for a in (weight, np.pad(bias, (0, extra)))]


@dataclass(frozen=True)
class NCHWcWindow(Family):
    name, node, nchwc = "nchwc_window", Window, True
    kind: str  # conv, max, average
    batch: int
    x: Layout
    y: Layout
    taps: Taps
    strips: tuple[Strip, ...]
    epilogue: Epilogue

    @classmethod
    def fits(cls, work: Workload, machine: Machine) -> bool:
        # The halo holds zeros, which must not be the largest value of a window, on whichever side it reaches out.
        halo_wins = work.node.kind == "max" and work.polyphase.halo > 0 and not work.non_negative
        return fits_nchwc(work, machine) and not halo_wins

    @classmethod
    def cycles(cls, work: Workload, schedule: Schedule, machine: Machine) -> float:
        return -(-work.y[1] // machine.lanes) * work.pixels * tap_cycles(Taps.of(work.node), machine)

    @classmethod
    def lower(cls, node: Window, program: Caller) -> relax.Expr:
        m, (batch, _, rows, columns) = program.machine, nchw(program.graph.shapes[node.output])
        x, source = program.fetch(node.inputs[0], True, Polyphase.of(program.graph, node).halo)
        y, taps, tiles = program.layout(node.output), Taps.of(node), strips(rows, columns, m.window_sums)
        starts = [at for s in tiles for start in s.starts for at in (taps.first(source, *start), y.at(*start))]
        constants, epilogue = [], Epilogue.of(node)
        if node.kind == "conv":
            y, epilogue, unit = in_steps(node, y)
            constants = pack_depthwise(node, m.lanes, source.dtype, unit)
        kernel = cls(node.kind, batch, source, y, taps, tiles, epilogue)
        return program.call(kernel, [x, np.array(starts, np.int32), *constants], batch * y.size)

    def emit(self, machine: Machine):
        x_at, y_at, lanes, offsets = self.x, self.y, machine.lanes, self.taps.offsets(self.x)
        tiles, runs = sum(len(strip.starts) for strip in self.strips), y_at.runs(lanes)
        cycles = self.batch * runs * y_at.rows * y_at.columns * len(offsets)

        def body(x, starts, *rest):
            x, y = as_steps(x) if self.kind == "conv" else x, rest[-1]

            def tile_code(strip: Strip, image, channels, tile):
                read = T.bind(image * x_at.size + x_at.run(channels, lanes) + starts[tile * 2])
                write = T.bind(image * y_at.size + y_at.run(channels, lanes) + starts[tile * 2 + 1])
                sums, (down, right) = Sums(len(strip.pixels), lanes), self.taps.stride
                for tap, offset in enumerate(offsets):
                    for i, (row, column) in enumerate(strip.pixels):
                        at = read + offset + row * down * x_at.row_stride + column * right * x_at.block
                        value = load(x, at, lanes)
                        if self.kind == "conv":
                            value = value * load(rest[0], (channels * len(offsets) + tap) * lanes, lanes)
                        if tap:
                            total = sums[i]
                            value = T.max(total, value) if self.kind == "max" else total + value
                        elif self.kind == "conv":
                            value = load(rest[1], channels * lanes, lanes) + value
                        sums[i] = value
                for i, (row, column) in enumerate(strip.pixels):
                    value = sums[i]
                    if self.kind == "average":
                        value = value * splat(1 / len(offsets), lanes)
                    self.epilogue.store(y, write + row * y_at.row_stride + column * y_at.block, value, lanes)

            with tasks(machine, self.batch * runs * tiles, cycles) as task:
                number, tile = T.bind(task // tiles), T.bind(task % tiles)
                image, channels = by_image(number, runs, self.batch)
                by_shape(tile, self.strips, lambda strip: tile_code(strip, image, channels, tile))
                clear_halo(y_at, y, image * y_at.size + y_at.run(channels, lanes), tile == 0, lanes)

        buffers = [("x", self.batch * x_at.size, x_at.dtype), ("tiles", 2 * tiles, "int32")]
        if self.kind == "conv":
            buffers += [("weight", runs * len(offsets) * lanes, "float32"), ("bias", runs * lanes, "float32")]
        return kernel([*buffers, ("y", self.batch * y_at.size, y_at.dtype)], body, machine)
