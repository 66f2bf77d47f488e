"""Zeros around the maps of NCHWc, so that windows that reach outside need no test."""

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout
from .emit import splat, store


def clear_halo(layout: Layout, y, at, when) -> None:
    """Zeros around the block that begins at y[at], written by the task for which `when` holds."""
    if not layout.halo:
        return
    block, zero = layout.block, splat(0.0, layout.block)
    wide = layout.halo * layout.row_stride // block
    with T.If(when), T.Then():
        for begin in (0, (layout.rows + layout.halo) * layout.row_stride):
            with T.serial(wide) as i:
                store(y, at + begin + i * block, zero, block)
        with T.serial(layout.rows) as row:
            for i in range(layout.halo):
                store(y, at + layout.at(0, i - layout.halo) + row * layout.row_stride, zero, block)
                store(y, at + layout.at(0, layout.columns + i) + row * layout.row_stride, zero, block)
