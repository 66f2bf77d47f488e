"""The program: one kernel a node, and a Relax function for the calls and the memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import tvm
from ml_dtypes import bfloat16
from tvm import relax

from ..kernels.family import Expansion, Kernel, Schedule
from ..kernels.instructions import stored
from ..kernels.reorder import Reorder
from ..onnx.blocks import Pattern
from ..onnx.geometry import Layout, nchw
from ..onnx.graph import Conv, Graph, Grid, Node, View
from ..plan.layout import Plan
from ..targets import Machine


@dataclass
class Program:
    """The Relax function under construction, and what it calls; kernels.family.Caller says what families may ask."""

    graph: Graph
    machine: Machine
    plan: Plan
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    values: dict[tuple[str, Layout], relax.Expr] = field(default_factory=dict)
    made: dict[str, Layout] = field(default_factory=dict)  # how each tensor was made
    functions: dict[Kernel, tvm.ir.GlobalVar] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)  # rows of deploy.json

    def schedule(self, node: Node) -> Schedule:
        return self.plan.schedules[node.output]

    def pattern(self, node: Conv) -> Pattern:
        return self.plan.patterns[node.output]

    def expansion(self, node: Conv) -> Expansion | None:
        return self.plan.expansions.get(node.output)

    def layout(self, tensor: str) -> Layout:
        if tensor in self.made:
            return self.made[tensor]
        _, channels, rows, columns = nchw(self.graph.shapes[tensor])
        if tensor in self.plan.nchwc and rows * columns > 1:
            number = self.number(self.graph.grid(tensor))
            return self.nchwc(channels, rows, columns, number, self.plan.halos.get(tensor, 0))
        return Layout(channels, rows, columns)

    def number(self, grid: Grid | None) -> str | Grid:
        if self.machine.dtype == "int8":
            return grid or "float32"
        return self.machine.dtype

    def nchwc(self, channels: int, rows: int, columns: int, number: str | Grid, halo: int = 0) -> Layout:
        block = self.machine.block(channels, np.dtype(stored(number)).itemsize)
        return Layout(channels, rows, columns, block, halo, number)

    def fetch(self, tensor: str, nchwc: bool = False, halo: int = 0) -> tuple[relax.Expr, Layout]:
        have = self.made[tensor]
        want = Layout(*have.shape, halo=halo)
        if nchwc:
            want = self.nchwc(*have.shape, self.number(self.graph.grid(tensor)), halo)
        if have.block == want.block and (have.halo == halo or (have.block > 1 and have.halo > halo)):
            return self.values[tensor, have], have
        if (tensor, want) not in self.values:
            batch = self.graph.shapes[tensor][0]
            reorder = Reorder(batch, have, want)
            self.values[tensor, want] = self.call(reorder, [self.values[tensor, have]], batch * want.size)
        return self.values[tensor, want], want

    def call(self, kernel: Kernel, arguments: list, length: int, layers: tuple[Conv, ...] = ()) -> relax.Expr:
        if kernel not in self.functions:
            name = f"{kernel.name}_{len(self.functions)}"
            self.functions[kernel] = self.builder.add_func(kernel.emit(self.machine), name)
        function = self.functions[kernel]
        self.layers += [self._row(node, function.name_hint) for node in layers]
        arguments = [relax.const(a) if isinstance(a, np.ndarray) else a for a in arguments]
        kind = relax.TensorType((int(length),), stored(kernel.made))
        return self.builder.emit(relax.call_tir(function, arguments, out_ty=kind))

    def _row(self, node: Conv, function: str) -> dict:
        """What deploy.json says of a layer."""
        schedule, pattern = self.schedule(node), self.pattern(node)
        return {
            "name": node.name,
            "shape": list(node.weight.shape),
            "pixels": int(np.prod(nchw(self.graph.shapes[node.output])[2:])),
            "N": pattern.block if pattern.density < 1 else None,
            "density": round(pattern.density, 4),
            "kernel": schedule.text + (", depthwise in front" if node.depthwise else ""),
            "sparse": schedule.sparse,
            "function": function,
        }

    def lower(self, node: Node) -> None:
        if any(node is expansion.node for expansion in self.plan.expansions.values()):
            return  # inside the kernel of the convolution that reads it
        if isinstance(node, View):
            value = self.fetch(node.inputs[0])[0]  # kernels see flat memory
        else:
            value = self.schedule(node).family.lower(node, self)
        self.made[node.output] = self.layout(node.output)
        self.values[node.output, self.made[node.output]] = value

    @property
    def module(self) -> tvm.IRModule:
        return self.builder.get()

    def calls(self) -> Iterator[tuple[Kernel, str, list[np.ndarray]]]:
        """(kernel, its function's name, its inputs and its output) of every call, in order; unknown ones are random."""
        random, kernels = np.random.default_rng(0), {f.name_hint: kernel for kernel, f in self.functions.items()}

        def array(kind, value=None):
            shape = [int(size) for size in kind.shape]
            if value:
                return value.numpy()
            numbers, dtype = random.standard_normal(shape), str(kind.dtype)
            if dtype == "uint8":
                return random.integers(0, 256, shape, np.uint8)
            return numbers.astype(bfloat16).view(dtype) if dtype == "uint16" else numbers.astype(dtype)

        for binding in (binding for block in self.module["main"].body.blocks for binding in block.bindings):
            call = binding.value
            if call.op.name == "relax.call_tir":
                name, inputs, output = call.args[0].name_hint, call.args[1], call.ty_args[0]
                arrays = [array(i.ty, getattr(i, "value", None)) for i in inputs] + [array(output)]
                yield kernels[name], name, arrays


def _reshape(value, shape) -> relax.Expr:
    """The same memory under another shape."""
    kind = relax.TensorType(shape, "float32")
    return relax.call_pure_packed("vm.builtin.reshape", value, relax.ShapeExpr(shape), ty_args=kind)


def make_program(graph: Graph, machine: Machine, plan: Plan) -> Program:
    """The program, when everything is decided: its `main` maps (B, C, H, W) to logits, or to several outputs."""
    p = Program(graph, machine, plan)
    shape = graph.shapes[graph.input]
    images = relax.Var(graph.input, relax.TensorType(shape, "float32"))
    with p.builder.function("main", [images]):
        with p.builder.dataflow():
            p.made[graph.input] = Layout(*nchw(shape)[1:])
            p.values[graph.input, p.made[graph.input]] = p.builder.emit(_reshape(images, (int(np.prod(shape)),)))
            for node in graph.nodes:
                p.lower(node)
            made = [_reshape(p.fetch(tensor)[0], graph.shapes[tensor]) for tensor in graph.outputs.values()]
            out = p.builder.emit_output(made[0] if len(made) == 1 else relax.Tuple([p.builder.emit(m) for m in made]))
        p.builder.emit_func_output(out)
    return p
