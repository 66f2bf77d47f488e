"""From the simplified graph to a compiled program: one kernel a node, Relax for the calls, the memory and the file."""

from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from ..kernels import elementwise, nchw, nchw_conv
from ..kernels.nchwc import Turn, turn
from ..kernels.schedule import plan
from ..onnx.blocks import pack
from ..onnx.geometry import Map, four, planes_of
from ..onnx.graph import Affine, Concat, Conv, Graph, Mean, Move, Node, View, Window
from ..plan.layout import Layout
from ..targets import Machine
from . import lower_lanes


def _flat(length: int):
    return relax.TensorType((int(length),), "float32")


TILES = {
    "pixel": "{} rows x {} vectors of pixels",
    "row": "{} rows x all pixels",
    "lanes": "{} rows in lanes x {} pixels",
}


@dataclass
class Program:
    """The Relax function under construction."""

    graph: Graph
    machine: Machine
    layout: Layout
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    values: dict[tuple[str, Map], relax.Expr] = field(default_factory=dict)
    maps: dict[str, Map] = field(default_factory=dict)  # how each tensor was made
    functions: dict[tuple, tvm.ir.GlobalVar] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)

    def call(self, make, spec, arguments: list, length: int):
        """Call the kernel `make(spec)` with tensors and NumPy constants; layers of one geometry share it."""
        if (make, spec) not in self.functions:
            name = f"{make.__name__}_{len(self.functions)}"
            self.functions[make, spec] = self.builder.add_func(make(spec), name)
        for row in self.layers:
            row.setdefault("function", self.functions[make, spec].name_hint)
        arguments = [relax.const(a) if isinstance(a, np.ndarray) else a for a in arguments]
        return self.builder.emit(relax.call_tir(self.functions[make, spec], arguments, out_ty=_flat(length)))

    def size(self, tensor: str) -> int:
        return int(np.prod(self.graph.shapes[tensor]))

    def shape(self, tensor: str) -> tuple[int, int, int, int]:
        return four(self.graph.shapes[tensor])

    def made(self, tensor: str) -> Map:
        """How the layout wants `tensor` to be made."""
        _, channels, rows, columns = self.shape(tensor)
        if tensor in self.layout.lanes and rows * columns > 1:
            return Map(channels, rows, columns, self.machine.lanes, self.layout.borders.get(tensor, 0))
        return Map(channels, rows, columns)

    def fetch(self, tensor: str, lanes: int = 1, border: int = 0):
        """`tensor` in blocks of `lanes` channels with at least `border` zeros around them, and its map."""
        have = self.maps[tensor]
        if have.lanes == lanes and (have.border == border or (lanes > 1 and have.border > border)):
            return self.values[tensor, have], have
        want = Map(have.channels, have.rows, have.columns, lanes, border)
        if (tensor, want) not in self.values:
            batch = self.shape(tensor)[0]
            spec = Turn(batch, have, want)
            self.values[tensor, want] = self.call(turn, spec, [self.values[tensor, have]], batch * want.size)
        return self.values[tensor, want], want

    def planes(self, tensor: str):
        """`tensor` as a plain (B, C, H, W) array."""
        return self.fetch(tensor)[0]

    def record(self, node: Conv) -> None:
        """Add what deploy.json says of a layer."""
        pattern, choice = self.layout.patterns[node.output], self.layout.choices[node.output]
        tile, inside = TILES[choice.kernel].format(choice.group, choice.vectors), ", depthwise inside"
        row = {
            "name": node.name,
            "shape": list(node.weight.shape),
            "pixels": int(np.prod(self.shape(node.output)[2:])),
            "N": pattern.block if pattern.density < 1 else None,
            "density": round(pattern.density, 4),
            "kernel": f"{'sparse' if choice.sparse else 'dense'}, {tile}{inside if node.first else ''}",
            "sparse": choice.sparse,
        }
        self.layers.append(row)

    def lower(self, node: Node) -> None:
        if any(node is expand for expand in self.layout.expansions.values()):
            return  # inside the kernel of the convolution that reads it
        inside = node.output in self.layout.lanes
        value = (lower_lanes.LOWER if inside else LOWER)[type(node)](self, node)
        self.maps[node.output] = self.made(node.output)
        self.values[node.output, self.maps[node.output]] = value


def _starts(bands) -> np.ndarray:
    starts = [number for band in bands for start in band.starts for number in start]
    return np.array(starts or [0, 0], np.int32)


def _conv(p: Program, node: Conv):
    source = node.inputs[0]
    if node.first is not None:
        source = node.first.output
        p.lower(node.first)
    x, (batch, channels, rows, columns) = p.planes(source), p.shape(source)
    m, shape, choice = p.machine, planes_of(p.graph, node), p.layout.choices[node.output]
    each, total, width = rows * columns, batch * channels * rows * columns, columns
    if shape.needed:
        spread = nchw.Spread(batch * channels, shape, m.lanes)
        x = p.call(nchw.spread, spread, [x], spread.total)
        each, total, width = shape.size, spread.total, shape.width
    offsets = (np.arange(channels)[:, None] * each + np.array(shape.offsets)).reshape(-1)
    packed = pack(node, p.layout.patterns[node.output], choice, offsets)
    pixels = shape.out_rows * shape.out_columns
    bands = plan(shape.out_rows, shape.out_columns, width, m.lanes, choice.vectors) if choice.kernel == "pixel" else ()
    spec = nchw_conv.Gemm(
        batch, len(node.weight), choice.group, len(packed.offset), choice.sparse, channels * each, total, pixels, bands,
        choice.unroll, packed.weight.nbytes > 4 * channels * each, node.activation, len(node.inputs) > 1, m.lanes,
        round(batch * choice.cycles),
    )  # fmt: skip
    residual = [p.planes(name) for name in node.inputs[1:]]
    arguments = [x, packed.weight, packed.offset, packed.pointer, packed.bias, _starts(bands), *residual]
    p.record(node)
    make = nchw_conv.pixel_gemm if choice.kernel == "pixel" else nchw_conv.row_gemm
    return p.call(make, spec, arguments, p.size(node.output))


def _window(p: Program, node: Window):
    x, (batch, channels) = p.planes(node.inputs[0]), p.shape(node.inputs[0])[:2]
    m, shape = p.machine, planes_of(p.graph, node)
    if node.kind == "conv" and nchw.together(shape, channels, m.lanes):
        spec, constants = nchw.small(shape, batch, node.weight, node.bias, node.activation, m.lanes)
        return p.call(nchw.small_window, spec, [x, *constants], p.size(node.output))
    bands = plan(shape.out_rows, shape.out_columns, shape.width, m.lanes, m.accumulators // 3)
    spec = nchw.Window(node.kind, batch, channels, shape, bands, node.activation, m.lanes)
    weights = [np.ascontiguousarray(node.weight.reshape(-1)), node.bias] if node.kind == "conv" else []
    return p.call(nchw.window, spec, [x, _starts(bands), *weights], p.size(node.output))


def _affine(p: Program, node: Affine):
    batch, channels, rows, columns = p.shape(node.output)
    operands, arguments = [], [p.planes(node.inputs[0])]
    for value in (node.scale, node.shift):
        if isinstance(value, str):
            operands.append("whole" if p.size(value) == p.size(node.output) else batch * channels)
            arguments.append(p.planes(value))
        else:
            operands.append(None if value is None else channels)
            arguments += [] if value is None else [value.astype(np.float32)]
    spec = elementwise.Affine(batch * channels, rows * columns, *operands, node.activation, p.machine.lanes)
    return p.call(elementwise.affine, spec, arguments, p.size(node.output))


def _mean(p: Program, node: Mean):
    batch, channels, rows, columns = p.shape(node.inputs[0])
    spec = nchw.Mean(batch * channels, rows * columns, node.activation, p.machine.lanes)
    return p.call(nchw.mean, spec, [p.planes(node.inputs[0])], p.size(node.output))


def _move(p: Program, node: Move):
    source, target = p.graph.shapes[node.inputs[0]], p.graph.shapes[node.output]
    spec = elementwise.Move(source, target, node.starts, node.steps, node.fill)
    return p.call(elementwise.move, spec, [p.planes(node.inputs[0])], p.size(node.output))


def _concat(p: Program, node: Concat):
    shapes = [p.graph.shapes[name] for name in node.inputs]
    outer = int(np.prod(shapes[0][: node.axis]))
    spec = elementwise.Concat(outer, tuple(int(np.prod(s[node.axis :])) for s in shapes), p.machine.lanes)
    return p.call(elementwise.concat, spec, [p.planes(name) for name in node.inputs], p.size(node.output))


def _view(p: Program, node: View):
    return p.planes(node.inputs[0])  # kernels see flat memory


LOWER = {View: _view, Conv: _conv, Window: _window, Affine: _affine, Mean: _mean, Move: _move, Concat: _concat}


def _reshape(value, shape):
    """The same memory under another shape."""
    kind = relax.TensorType(shape, "float32")
    return relax.call_pure_packed("vm.builtin.reshape", value, relax.ShapeExpr(shape), ty_args=kind)


def program(graph: Graph, machine: Machine, layout: Layout) -> tuple[tvm.IRModule, list[dict]]:
    """The program, when everything is decided, and a row of deploy.json for every layer."""
    p = Program(graph, machine, layout)
    images = relax.Var(graph.input, relax.TensorType(graph.shapes[graph.input], "float32"))
    with p.builder.function("main", [images]):
        with p.builder.dataflow():
            flat = (p.size(graph.input),)
            p.maps[graph.input] = Map(*p.shape(graph.input)[1:])
            p.values[graph.input, p.maps[graph.input]] = p.builder.emit(_reshape(images, flat))
            for node in graph.nodes:
                p.lower(node)
            out = p.builder.emit_output(_reshape(p.planes(graph.output), graph.shapes[graph.output]))
        p.builder.emit_func_output(out)
    return p.builder.get(), p.layers


def calls(module: tvm.IRModule):
    """(kernel, its inputs and its output as NumPy arrays, the unknown ones random) of every call, in order."""
    random = np.random.default_rng(0)

    def array(kind, value=None):
        shape = [int(size) for size in kind.shape]
        return value.numpy() if value else random.standard_normal(shape).astype(np.float32)

    for binding in (binding for block in module["main"].body.blocks for binding in block.bindings):
        call = binding.value
        if call.op.name == "relax.call_tir":
            name, inputs, output = call.args[0].name_hint, call.args[1], call.ty_args[0]
            yield name, [array(i.ty, getattr(i, "value", None)) for i in inputs] + [array(output)]
