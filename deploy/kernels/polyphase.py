"""The prologue of NCHW windows: a channel with its padding, split into the phases of the stride."""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Polyphase
from ..targets import Machine
from .emit import kernel, load, over, pick, splat, store, tasks
from .family import Kernel
from .tiles import pieces


def _inside(phase: int, pad: int, stride: int, length: int, limit: int) -> tuple[int, int]:
    """The rows (or columns) [first, last) of a phase that hold input rather than padding."""
    first = max(0, -(-(pad - phase) // stride))
    return first, max(first, min(limit, -(-(length + pad - phase) // stride)))


def _fill(target, at, length: int, value: float, lanes: int) -> None:
    if length:
        over(length, lanes, lambda i, width: store(target, at + i, splat(value, width), width))


def _copy_row(source, read, target, write, first: int, count: int, columns: int, stride: int, lanes: int) -> None:
    """target[i] = source[first + stride * i], of a source row of `columns`, without reading outside of it."""
    if stride == 1:
        for at, width in pieces(count, lanes):
            store(target, write + at, load(source, read + first + at, width), width)
    elif stride == 2 and columns > 1:
        for at, width in pieces(count, min(lanes, columns // 2)):
            begin = min(first + 2 * at, columns - 2 * width)  # the vector's last, unwanted lane may not leave the row
            chosen = [first + 2 * at - begin + 2 * i for i in range(width)]
            store(target, write + at, pick(load(source, read + begin, 2 * width), chosen, 2 * width), width)
    else:
        with T.serial(count) as i:
            store(target, write + i, source[read + first + i * stride], 1)


def split_channel(p: Polyphase, source, read, target, write, fill: float, lanes: int) -> None:
    """One channel of `source` into its phases, with `fill` as padding."""
    (sy, sx), (above, left_of) = p.taps.stride, p.taps.pad
    for number, (phase_y, phase_x) in enumerate(p.phases):
        plane = write + number * p.height * p.width
        top, bottom = _inside(phase_y, above, sy, p.rows, p.height)
        left, right = _inside(phase_x, left_of, sx, p.columns, p.width)
        if right == left:
            top = bottom = 0
        _fill(target, plane, top * p.width, fill, lanes)
        _fill(target, plane + bottom * p.width, (p.height - bottom) * p.width, fill, lanes)
        if bottom == top:
            continue
        with T.serial(bottom - top) as i:
            row = T.bind(plane + (top + i) * p.width)
            begin = T.bind(read + ((top + i) * sy + phase_y - above) * p.columns)
            first = left * sx + phase_x - left_of
            _fill(target, row, left, fill, lanes)
            _fill(target, row + right, p.width - right, fill, lanes)
            _copy_row(source, begin, target, row + left, first, right - left, p.columns, sx, lanes)


@dataclass(frozen=True)
class PolyphaseSplit(Kernel):
    """x (channels, rows, columns) to its padded phases."""

    name = "polyphase_split"
    channels: int  # of all images together
    polyphase: Polyphase
    slack: int  # values behind the last channel: a vector that runs over the last row's end stays inside

    @property
    def total(self) -> int:
        """Values of the output."""
        return self.channels * self.polyphase.size + self.slack

    def emit(self, machine: Machine):
        p = self.polyphase

        def body(x, y):
            with tasks(machine, self.channels, self.total / 4) as c:
                split_channel(p, x, c * (p.rows * p.columns), y, c * p.size, 0.0, machine.lanes)

        return kernel([("x", self.channels * p.rows * p.columns, "float32"), ("y", self.total, "float32")], body)
