"""Convolutions and classifiers whose maps are NCHW: what the two families of them share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Polyphase, nchw
from ..onnx.graph import Conv
from ..targets import Machine
from .emit import tasks, when
from .epilogue import Epilogue
from .family import Caller, ConvFamily, Schedule, Workload
from .instructions import stored
from .polyphase import PolyphaseSplit
from .product import Product, columns_of, pack
from .tiles import Band


@dataclass(frozen=True)
class NCHWConv(ConvFamily):
    batch: int
    product: Product
    x_size: int  # values of an image of the input
    x_total: int  # values of the whole input buffer
    pixels: int  # of an output map
    bands: tuple[Band, ...]  # tiles of pixels; none: a task has all pixels
    rows_first: bool  # neighbouring tasks share rows (and weights), not pixels
    epilogue: Epilogue
    cycles_in_all: int  # about what it takes on one thread

    @classmethod
    def stored(cls, machine: Machine) -> str:
        """The type in which its weights are stored."""
        return "float32"

    @classmethod
    def dense_groups(cls, work: Workload, machine: Machine) -> list[int]:
        rows = work.weight_shape[0]
        return [g for g in (4, 8, 12, 16, 32, 64) if g < rows + 4] or [rows]

    @classmethod
    def weight_cycles(cls, work: Workload, schedule: Schedule, m: Machine) -> float:
        """To fetch the weights and the offset of a column."""
        rows, columns = work.weight_shape
        each = np.dtype(stored(cls.stored(m))).itemsize * schedule.group + 4 * schedule.sparse
        near = -(-rows // schedule.group) * columns * schedule.density * each < m.core.l2_bytes // 2
        return each / (m.core.l2_rate if near else m.core.l3_rate)

    @classmethod
    def prologue_cycles(cls, work: Workload, machine: Machine) -> float:
        if work.node.depthwise or not work.polyphase.needed:
            return 0.0
        return work.x[1] * work.polyphase.size / 4  # short rows: a quarter of a cycle a value

    @classmethod
    def bands_of(cls, polyphase: Polyphase, width: int, schedule: Schedule, machine: Machine) -> tuple[Band, ...]:
        """Tiles of an output whose input rows lie `width` apart."""
        return ()

    @classmethod
    def lower(cls, node: Conv, program: Caller) -> relax.Expr:
        schedule, source = program.schedule(node), node.inputs[0]
        if node.depthwise is not None:  # in NCHW a kernel of its own
            source = node.depthwise.output
            program.lower(node.depthwise)
        x, (batch, channels, rows, columns) = program.fetch(source)[0], nchw(program.graph.shapes[source])
        polyphase = Polyphase.of(program.graph, node)
        each, total, width = rows * columns, batch * channels * rows * columns, columns
        if polyphase.needed:
            split = PolyphaseSplit(batch * channels, polyphase, program.machine.lanes)
            x = program.call(split, [x], split.total)
            each, total, width = polyphase.size, split.total, polyphase.width
        offsets = (np.arange(channels)[:, None] * each + np.array(polyphase.offsets)).reshape(-1)
        columns = columns_of(node, program.pattern(node), schedule, offsets)
        product, packed = pack(node, schedule, columns, cls.stored(program.machine))
        bands = cls.bands_of(polyphase, width, schedule, program.machine)
        kernel = cls(
            batch, product, channels * each, total, polyphase.out_rows * polyphase.out_columns, bands,
            packed[0].nbytes > 4 * channels * each, Epilogue.of(node),
            round(batch * schedule.cycles),
        )  # fmt: skip
        residual = [program.fetch(name)[0] for name in node.inputs[1:]]
        arguments = [x, *packed, starts_of(bands), *residual]
        return program.call(kernel, arguments, batch * product.rows * kernel.pixels, (node,))

    @property
    def tiles(self) -> int:
        return sum(len(band.starts) for band in self.bands) or 1

    def buffers(self) -> list[tuple[str, int, str]]:
        size = self.batch * self.product.rows * self.pixels
        buffers = [("x", self.x_total, "float32"), *self.product.buffers(), ("tiles", 2 * self.tiles, "int32")]
        if self.epilogue.residual:
            buffers.append(("residual", size, "float32"))
        return [*buffers, ("y", size, "float32")]

    def over_tasks(self, machine: Machine, body: Callable) -> None:
        """Emit `body(image, group, tile)` for one parallel task each."""
        groups = self.product.groups
        with tasks(machine, self.batch * self.tiles * groups, self.cycles_in_all) as task:
            inner = self.tiles if self.rows_first else groups
            a, b = T.bind(task % inner), T.bind(task // inner % (self.tiles * groups // inner))
            image = T.bind(task // (self.tiles * groups)) if self.batch > 1 else 0
            body(image, *((b, a) if self.rows_first else (a, b)))

    def if_there(self, row: int, group):
        """What is emitted inside is skipped for the rows that the last group lacks."""
        last = self.product.rows % self.product.group
        return when(group < self.product.groups - 1, bool(last) and row >= last)


def starts_of(bands: tuple[Band, ...]) -> np.ndarray:
    """Where each tile is read and written."""
    starts = [number for band in bands for start in band.starts for number in start]
    return np.array(starts or [0, 0], np.int32)
