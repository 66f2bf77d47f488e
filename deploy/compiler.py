"""From an ONNX file to a compiled library, step by step."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils import machine

from .dump import forget
from .onnx.graph import Graph
from .onnx.passes import simplify
from .onnx.reader import read_onnx
from .targets import find_machine

if TYPE_CHECKING:
    from .codegen.build import Compiled


def compile_onnx(
    path: str | Path,
    target: str = "native",
    threads: int | None = None,
    batch: int | None = None,
    sparsity: float = 0.0,
    dense: bool = False,
    image_size: tuple[int, int] | None = None,
    tune: str | Path | None = None,
    dtype: str = "float32",
) -> Compiled:
    """Compile the network in an ONNX file.

    target: native, a row of targets.TARGETS, or any TVM target. threads: as many as there are cores if not said. batch:
    fixes a batch that the file leaves open. sparsity: the least fraction of zero blocks a layer needs to be compiled
    sparse. dense: compile every layer dense. image_size: fixes height and width that the file leaves open.
    tune: choose kernels by measuring, and keep what was measured in this file. dtype: what maps and weights hold where
    that is faster: float32, bfloat16 (rounded to nearest even, with sums in float32), or int8, which leaves what the
    file has not quantised in float32.
    ValueError, of one line, for whatever is wrong with these or the file.
    """
    graph = simplify(read_onnx(path, batch, image_size))
    return compile_graph(graph, path, target, threads, sparsity, dense, tune=tune, dtype=dtype)


def compile_graph(
    graph: Graph,
    path,
    target="native",
    threads=None,
    sparsity=0.0,
    dense=False,
    dump=forget,
    tune=None,
    device=None,
    dtype="float32",
) -> Compiled:
    """As compile_onnx, for the graph read from `path`.

    dump(name, program) sees the program on its way. device: the `remote.Device` that tuning measures on.
    """
    threads = threads or machine.cores()
    aim = find_machine(target).with_dtype(dtype)
    if dtype == "int8" and not graph.quantised:
        raise ValueError(f"dtype int8: {path} has no QuantizeLinear, so nothing in it has 8 bits (deploy.quantise)")
    from .codegen import build, program  # late: if TVM is missing, find_machine has said so
    from .plan.cost import CostModel
    from .plan.layout import make_plan
    from .tuning import core
    from .tuning.tune import MeasuredCostModel, Times

    aim = replace(aim if aim.known or device else core.described(aim, tune), threads=threads)
    facts = (graph, aim, dense, sparsity)
    costs = MeasuredCostModel(Times(tune, aim, device), *facts) if tune else CostModel(*facts)
    made = program.make_program(graph, aim, make_plan(costs))
    executable, weights = build.build(made.module, aim, dump)
    outputs = [{"name": name, "shape": list(graph.shapes[tensor])} for name, tensor in graph.outputs.items()]
    info = {
        "onnx": str(path),
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "target": str(aim.target),
        "requires": aim.requires,
        "core": asdict(aim.core),
        "threads": threads,
        "dtype": dtype,
        "tuned": str(tune) if tune else None,
        "batch": graph.shapes[graph.input][0],
        "input": {"name": graph.input, "shape": list(graph.shapes[graph.input])},
        "output": outputs[0],
        "outputs": outputs,
        "pictures": graph.pictures,
        "layers": made.layers,
    }
    return build.Compiled(executable, weights, info)
