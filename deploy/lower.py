"""From the simplified graph to a compiled program: one kernel a node, Relax for the calls, the memory and the file."""

from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from . import elementwise, kernels, planes
from .blocks import find_blocks, matrix, pack
from .build import build
from .dump import forget
from .graph import Affine, Concat, Conv, Graph, Mean, Move, Node, View, Window
from .schedule import Choice, Site, choose, plan
from .targets import Machine


def lowering() -> tvm.transform.Sequential:
    """Ten passes of Relax. Its default pipeline expects kernels made of s_tir blocks, which ours are not."""
    t = relax.transform
    return tvm.transform.Sequential(
        [
            t.ToNonDataflow(),
            t.RemovePurityChecking(),
            t.CallTIRRewrite(),
            t.StaticPlanBlockMemory(),
            t.LowerAllocTensor(),
            t.KillAfterLastUse(),
            t.LowerRuntimeBuiltin(),
            t.ComputePrimValue(),
            t.VMShapeLower(),
            t.AttachGlobalSymbol(),
        ]
    )


def _flat(length: int):
    return relax.TensorType((int(length),), "float32")


@dataclass
class Program:
    """The Relax function under construction."""

    graph: Graph
    machine: Machine
    least_sparsity: float  # a layer with a smaller fraction of zero blocks is compiled dense
    dense: bool  # compile every layer dense: the twin to compare with
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    values: dict[str, relax.Expr] = field(default_factory=dict)
    functions: dict[tuple, tvm.ir.GlobalVar] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)

    def call(self, make, spec, arguments: list, length: int):
        """Call the kernel `make(spec)` with tensors and NumPy constants; layers of one geometry share it."""
        if (make, spec) not in self.functions:
            name = f"{make.__name__}_{len(self.functions)}"
            self.functions[make, spec] = self.builder.add_func(make(spec), name)
        arguments = [relax.const(a) if isinstance(a, np.ndarray) else a for a in arguments]
        return self.builder.emit(relax.call_tir(self.functions[make, spec], arguments, out_ty=_flat(length)))

    def size(self, tensor: str) -> int:
        return int(np.prod(self.graph.shapes[tensor]))

    def map(self, tensor: str) -> tuple[int, int, int, int]:
        """(batch, channels, rows, columns), also of a tensor that has lost its height and width."""
        shape = self.graph.shapes[tensor]
        return (*shape, *(1,) * (4 - len(shape)))

    def lower(self, node: Node) -> None:
        self.values[node.output] = LOWER[type(node)](self, node, [self.values[name] for name in node.inputs])


def _starts(bands) -> np.ndarray:
    starts = [number for band in bands for start in band.starts for number in start]
    return np.array(starts or [0, 0], np.int32)


def _planes(p: Program, node: Conv | Window, kernel: tuple[int, int]) -> planes.Planes:
    _, _, rows, columns = p.map(node.inputs[0])
    return planes.Planes(rows, columns, *p.map(node.output)[2:], kernel, node.stride, node.pad, node.dilation)


def _conv(p: Program, node: Conv, inputs: list):
    batch, channels, rows, columns = p.map(node.inputs[0])
    m, shape = p.machine, _planes(p, node, node.weight.shape[2:])
    x, each, total, width = inputs[0], rows * columns, batch * channels * rows * columns, columns
    if shape.needed:
        spread = planes.Spread(batch * channels, shape, m.lanes)
        x = p.call(planes.spread, spread, [x], spread.total)
        each, total, width = shape.size, spread.total, shape.width
    site = Site(
        len(node.weight), matrix(node.weight).shape[1], shape.out_rows, shape.out_columns, width, not shape.needed
    )
    pattern = find_blocks(node.weight)
    density = pattern.density
    # A rate of 0.5 prunes int(0.5 * blocks), so a layer asked to be half empty may be a little less.
    as_dense = p.dense or 1 - density < p.least_sparsity - 0.01
    choice = choose(site, m, pattern.block, 1.0 if as_dense else density)
    offsets = (np.arange(channels)[:, None] * each + np.array(shape.offsets)).reshape(-1)
    keep = np.repeat(pattern.keep, pattern.block // choice.group, axis=0) if choice.sparse else None
    if keep is not None:
        keep = keep[: -(-len(node.weight) // choice.group)]
    packed = pack(node.weight, node.bias, keep, choice.group, offsets, choice.unroll)
    bands = plan(site.out_rows, site.out_columns, width, m.lanes, choice.vectors) if choice.kernel == "pixel" else ()
    spec = kernels.Gemm(
        batch, site.rows, choice.group, len(packed.offset), choice.sparse, channels * each, total, site.pixels, bands,
        choice.unroll, packed.weight.nbytes > 4 * channels * each, node.activation, len(inputs) > 1, m.lanes,
        round(batch * choice.cycles),
    )  # fmt: skip
    arguments = [x, packed.weight, packed.offset, packed.pointer, packed.bias, _starts(bands), *inputs[1:]]
    p.layers.append(_layer_row(node, site, pattern, choice))
    make = kernels.pixel_gemm if choice.kernel == "pixel" else kernels.row_gemm
    return p.call(make, spec, arguments, p.size(node.output))


def _layer_row(node: Conv, site: Site, pattern, choice: Choice) -> dict:
    tile = f"{choice.group} rows x " + (f"{choice.vectors} vectors" if choice.kernel == "pixel" else "pixels in lanes")
    return {
        "name": node.name,
        "shape": list(node.weight.shape),
        "pixels": site.pixels,
        "N": pattern.block if pattern.density < 1 else None,
        "density": round(pattern.density, 4),
        "kernel": f"{'sparse' if choice.sparse else 'dense'}, {tile}",
        "sparse": choice.sparse,
    }


def _window(p: Program, node: Window, inputs: list):
    batch, channels = p.map(node.inputs[0])[:2]
    m, shape = p.machine, _planes(p, node, node.kernel)
    if node.kind == "conv" and planes.together(shape, channels, m.lanes):
        spec, constants = planes.small(shape, batch, node.weight, node.bias, node.activation, m.lanes)
        return p.call(planes.small_window, spec, [inputs[0], *constants], p.size(node.output))
    bands = plan(shape.out_rows, shape.out_columns, shape.width, m.lanes, m.accumulators // 3)
    spec = planes.Window(node.kind, batch, channels, shape, bands, node.activation, m.lanes)
    weights = [np.ascontiguousarray(node.weight.reshape(-1)), node.bias] if node.kind == "conv" else []
    return p.call(planes.window, spec, [inputs[0], _starts(bands), *weights], p.size(node.output))


def _affine(p: Program, node: Affine, inputs: list):
    batch, channels, rows, columns = p.map(node.output)
    operands, arguments = [], [inputs[0]]
    for value in (node.scale, node.shift):
        if isinstance(value, str):
            operands.append("whole" if p.size(value) == p.size(node.output) else batch * channels)
            arguments.append(p.values[value])
        else:
            operands.append(None if value is None else channels)
            arguments += [] if value is None else [value.astype(np.float32)]
    spec = elementwise.Affine(batch * channels, rows * columns, *operands, node.activation, p.machine.lanes)
    return p.call(elementwise.affine, spec, arguments, p.size(node.output))


def _mean(p: Program, node: Mean, inputs: list):
    batch, channels, rows, columns = p.map(node.inputs[0])
    spec = planes.Mean(batch * channels, rows * columns, node.activation, p.machine.lanes)
    return p.call(planes.mean, spec, inputs, p.size(node.output))


def _move(p: Program, node: Move, inputs: list):
    source, target = p.graph.shapes[node.inputs[0]], p.graph.shapes[node.output]
    spec = elementwise.Move(source, target, node.starts, node.steps, node.fill)
    return p.call(elementwise.move, spec, inputs, p.size(node.output))


def _concat(p: Program, node: Concat, inputs: list):
    shapes = [p.graph.shapes[name] for name in node.inputs]
    outer = int(np.prod(shapes[0][: node.axis]))
    spec = elementwise.Concat(outer, tuple(int(np.prod(s[node.axis :])) for s in shapes), p.machine.lanes)
    return p.call(elementwise.concat, spec, inputs, p.size(node.output))


def _view(p: Program, node: View, inputs: list):
    return inputs[0]  # kernels see flat memory


LOWER = {View: _view, Conv: _conv, Window: _window, Affine: _affine, Mean: _mean, Move: _move, Concat: _concat}


def _reshape(value, shape):
    """The same memory under another shape."""
    kind = relax.TensorType(shape, "float32")
    return relax.call_pure_packed("vm.builtin.reshape", value, relax.ShapeExpr(shape), ty_args=kind)


def compile_graph(graph: Graph, machine: Machine, least_sparsity: float = 0.0, dense: bool = False, dump=forget):
    """What was built, whose `main` maps (B, C, H, W) to logits, and a row of deploy.json for every layer."""
    p = Program(graph, machine, least_sparsity, dense)
    images = relax.Var(graph.input, relax.TensorType(graph.shapes[graph.input], "float32"))
    with p.builder.function("main", [images]):
        with p.builder.dataflow():
            flat = (p.size(graph.input),)
            p.values[graph.input] = p.builder.emit(_reshape(images, flat))
            for node in graph.nodes:
                p.lower(node)
            out = p.builder.emit_output(_reshape(p.values[graph.output], graph.shapes[graph.output]))
        p.builder.emit_func_output(out)
    return build(p.builder.get(), machine.target, lowering(), dump), p.layers
