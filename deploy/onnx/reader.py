"""Read an ONNX file into a Graph.

What is constant is computed here, so a node's inputs are only tensors that depend on the picture. What cannot be read
is a ValueError of one line that names all nodes in question.
"""

from pathlib import Path

import numpy as np

from .bounds import (
    MOST_CONSTANTS,
    MOST_VALUES,
    check_outputs,
    check_size,
    check_window,
    inferred,
    name,
    small_map,
    title,
)
from .graph import Graph, Node
from .operators import READERS
from .pictures import read_pictures
from .quantised import Numbers, weight_scale

OPSET = 18  # older files are converted to it
ONNX = ("", "ai.onnx")  # the names of the operators' own domain
NO_CONSTANTS = ("If", "Loop", "Scan")  # whose time and memory nothing tells beforehand
PROBLEMS = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, MemoryError, RuntimeError)  # of a node
MOST_NAMED = 8  # refusals that are told of one file


class _Reader:
    """One ONNX node at a time; `constants` grows as nodes turn out to be computable."""

    def __init__(self, model):
        from onnx import helper, numpy_helper

        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.attribute_value = helper.get_attribute_value
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.alias: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.computed = 0  # values of constants
        self.quantised: dict[str, Numbers] = {}  # tensors that QuantizeLinear makes
        self.scales: dict[str, np.ndarray] = {}  # of constants that DequantizeLinear makes, if rows have one

    def attributes(self, node) -> dict:
        return {a.name: self.attribute_value(a) for a in node.attribute}

    def constant(self, node, index: int, default=None) -> np.ndarray:
        """Input `index`, which must be constant; `default` if it is absent."""
        if index >= len(node.input) or not node.input[index]:
            return default
        if node.input[index] not in self.constants:
            raise ValueError(f"{title(node)} needs a constant {node.input[index]!r}")
        return self.constants[node.input[index]]

    def read_all(self, nodes) -> None:
        """Read every node. ValueError with all that is refused; what follows from a refusal is not told again."""
        refused, unsupported, unknown = [], {}, set()
        constants = set(self.constants)  # with those that were refused
        for node in nodes:
            constants.update(node.output if constants.issuperset(filter(None, node.input)) else ())
            try:
                if node.domain not in ONNX:
                    raise ValueError(f"{title(node)} is of domain {node.domain!r}, which is not supported")
                if unknown.intersection(node.input):
                    if self.readable(node) or constants.issuperset(node.output):
                        unknown.update(node.output)
                        continue
                elif self.readable(node):
                    self.read(node)
                    continue
                unsupported.setdefault(node.op_type, []).append(repr(name(node)))
            except PROBLEMS as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                # What is raised here names the node; what NumPy and Python raise does not.
                refused.append(reason if title(node) in reason else f"{title(node)} cannot be read ({reason})")
            unknown.update(node.output)
        for operator, names in unsupported.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            plural, verb = ("nodes", "are") if len(names) > 1 else ("node", "is")
            refused.append(f"{plural} {', '.join(names[:3])}{more} (operator {operator}) {verb} not supported")
        if refused:
            more = [f"and {len(refused) - MOST_NAMED} more"] if len(refused) > MOST_NAMED else []
            told = "; ".join(" ".join(problem.split()) for problem in [*refused[:MOST_NAMED], *more])
            raise ValueError(told + (f"; supported are {', '.join(sorted(READERS))}" if unsupported else ""))

    def readable(self, node) -> bool:
        """Whether the node is of a known kind, or can be computed."""
        inputs = [name for name in node.input if name]
        constant = all(name in self.constants for name in inputs) and node.op_type not in NO_CONSTANTS
        return node.op_type in READERS or node.op_type == "Shape" or constant

    def read(self, node) -> None:
        inputs = [name for name in node.input if name]
        check_window(node, self.attributes(node))
        check_outputs(node, self.attributes(node))
        known = {name: self.shape(name) for name in inputs if self.tensor(name) in self.shapes}
        whole = self.quantised.keys() & set(inputs)  # of which ONNX's rules want another type than float32
        if whole and node.op_type != "DequantizeLinear":
            raise ValueError(f"{title(node)} reads what QuantizeLinear makes, which only DequantizeLinear may read")
        right = {} if whole else inferred(node, self.opsets, known, self.constants)
        if node.op_type == "Shape" and self.tensor(inputs[0]) in self.shapes:
            start, end = (self.attributes(node).get(k, d) for k, d in (("start", 0), ("end", None)))
            self.constants[node.output[0]] = np.array(self.shapes[self.tensor(inputs[0])][start:end], np.int64)
        elif all(name in self.constants for name in inputs):
            self.compute(node, inputs, right)
        else:
            READERS[node.op_type](self, node)
            for output, shape in right.items():
                if self.tensor(output) in self.shapes and self.shape(output) != shape:
                    raise ValueError(f"{title(node)} makes {shape} by ONNX's rules, and {self.shape(output)} by ours")

    def compute(self, node, inputs: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
        """The node's outputs, which are constant."""
        from onnx.reference import ReferenceEvaluator

        self.computed += sum(int(np.prod(shape, dtype=float)) for shape in shapes.values())
        if self.computed > MOST_CONSTANTS:
            raise ValueError(f"{title(node)}: the file's constants come to more than {MOST_CONSTANTS} values")
        evaluator = ReferenceEvaluator(node, opsets=self.opsets)
        values = evaluator.run(None, {name: self.constants[name] for name in inputs})
        self.constants.update(zip(node.output, values, strict=True))
        if node.op_type == "DequantizeLinear" and (scale := weight_scale(self, node)) is not None:
            self.scales[node.output[0]] = scale

    def scale(self, node, rows: int) -> np.ndarray | None:
        """(rows,): what the weights of a convolution are whole multiples of, if they were quantised."""
        scale = self.scales.get(node.input[1])
        if scale is None or scale.size not in (1, rows) or self.constants[node.input[1]].ndim != 4:
            return None
        return np.broadcast_to(scale.reshape(-1), rows).astype(np.float32)

    def tensor(self, name: str) -> str:
        return self.alias.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.constants:
            raise ValueError(f"its input {name!r} is constant, and must be computed from the picture")
        if self.tensor(name) not in self.shapes:
            raise ValueError(f"its input {name!r} is an output that is not supported")
        return self.shapes[self.tensor(name)]

    def add(self, make: type, node, inputs: list[str], shape, **fields) -> None:
        shape = tuple(shape)
        if not small_map(shape):
            raise ValueError(f"{title(node)} makes a map of {shape[2]} x {shape[3]}, which is too large to be compiled")
        self.put(make, node, inputs, node.output[0], shape, **fields)

    def put(self, make: type, node, inputs: list[str], output: str, shape, **fields) -> str:
        """Add a graph node, one of those that the ONNX node becomes."""
        check_size(node, shape := tuple(int(length) for length in shape))
        if min(shape, default=1) < 1:
            raise ValueError(f"{title(node)} makes a tensor {shape}, which holds no values")
        self.nodes.append(make(name(node), [self.tensor(i) for i in inputs], output, **fields))
        self.shapes[output] = shape
        return output


def _modern(model, path):
    """The model without functions of its own, and with operators as opset OPSET or a later one defines them."""
    from onnx import defs, inliner, version_converter

    model = inliner.inline_local_functions(model)
    for sparse in model.graph.sparse_initializer:
        model.graph.initializer.append(_dense(sparse, path))
    del model.graph.sparse_initializer[:]
    version = next((entry.version for entry in model.opset_import if entry.domain == ""), OPSET)
    newest = defs.onnx_opset_version()
    if version > newest:
        raise ValueError(f"--onnx_path {path} has opset {version}: the installed onnx knows opsets up to {newest}")
    if version >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # of C++, several kinds
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--onnx_path {path} has opset {version}, and cannot be made {OPSET} ({reason})") from error


def _dense(sparse, path):
    """A sparse initialiser, values at places, as an ordinary one."""
    from onnx import numpy_helper

    shape, values, at = tuple(sparse.dims), numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    if np.prod(shape, dtype=float) > MOST_CONSTANTS:
        raise ValueError(f"{path}: initialiser {sparse.values.name!r} {shape} has more than {MOST_CONSTANTS} values")
    dense = np.zeros(shape, values.dtype)
    dense[np.unravel_index(at, shape) if at.ndim == 1 else tuple(at.T)] = values
    return numpy_helper.from_array(dense, sparse.values.name)


def _kind(tensor) -> str:
    """The name of the type of its values, or what stands in its place."""
    from onnx import TensorProto

    kind = tensor.type.tensor_type.elem_type
    return TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else f"type {kind}"


def _size(dim) -> int | str:
    """The length, or the name of an open one. As in ONNX Runtime, a negative length is open and 0 is not."""
    fixed = dim.HasField("dim_value") and dim.dim_value >= 0
    return dim.dim_value if fixed else dim.dim_param or "?"


def _input_shape(path, tensor, batch: int | None, image_size: tuple[int, int] | None) -> tuple[int, ...]:
    dims = [_size(dim) for dim in tensor.type.tensor_type.shape.dim]
    told = list(dims)
    if 0 in dims:
        raise ValueError(
            f"{path} has a size of 0 in its input {tensor.name!r}: {told}; each must be at least 1, or open"
        )
    last = len(dims) == 4 and dims[3] in (1, 3, 4) and any(isinstance(d, str) for d in dims[1:3])  # NHWC
    sides = slice(1, 3) if last else slice(2, 4)
    if len(dims) == 4 and image_size:
        dims[sides] = [side if isinstance(d, str) else d for d, side in zip(dims[sides], image_size, strict=True)]
        if tuple(dims[sides]) != image_size:
            raise ValueError(f"--image_size {image_size[0]}x{image_size[1]}: {path} was exported for {told}")
    if not dims:
        raise ValueError(f"{path} does not say that its input {tensor.name!r} is a batch of pictures: it has no axes")
    if any(isinstance(d, str) for d in dims[1:]):
        hint = "--image_size fixes height and width" if len(dims) == 4 else "only the batch may be"
        raise ValueError(f"{path} leaves a size of its input {tensor.name!r} open: {told}; {hint}")
    if isinstance(dims[0], str):
        dims[0] = batch or 1
    elif batch not in (None, dims[0]):
        raise ValueError(f"--batch {batch}: {path} was exported for a batch of {dims[0]}")
    if np.prod(dims, dtype=float) > MOST_VALUES or not small_map(dims):
        raise ValueError(f"{path} takes pictures {tuple(dims)}, which are too large to be compiled")
    return tuple(dims)


def read_onnx(path: str | Path, batch: int | None = None, image_size: tuple[int, int] | None = None) -> Graph:
    """The graph of an ONNX file. `batch` (1 if not said) and `image_size` fix what the file leaves open."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError("--onnx_path needs onnx: pip install onnx") from error

    if not Path(path).is_file():
        raise ValueError(f"--onnx_path {path}: there is no such file")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, checker and missing external data each raise their own kind
        raise ValueError(
            f"--onnx_path {path} is not a valid ONNX file ({str(error).strip().splitlines()[0]})"
        ) from error
    pictures = read_pictures(model, path)
    model = _modern(model, path)
    try:
        reader = _Reader(model)
    except (ValueError, TypeError, KeyError, MemoryError) as error:
        raise ValueError(f"--onnx_path {path} has a damaged initialiser ({str(error).splitlines()[0]})") from error
    inputs = [i for i in model.graph.input if i.name not in reader.constants]
    if len(inputs) != 1 or not model.graph.output:
        raise ValueError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs; one input is supported"
        )
    reader.shapes[inputs[0].name] = _input_shape(path, inputs[0], batch, image_size)
    for role, tensor in (("input", inputs[0]), *(("output", output) for output in model.graph.output)):
        if tensor.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            kind = _kind(tensor)
            raise ValueError(f"{path} declares its {role} {tensor.name!r} as {kind}; only FLOAT, float32, is supported")
    reader.read_all(model.graph.node)
    outputs = {output.name: reader.tensor(output.name) for output in model.graph.output}
    for label, tensor in outputs.items():
        if label in reader.constants:
            raise ValueError(f"{path}: the output {label!r} does not depend on the input")
        if tensor not in reader.shapes:
            maker = next(node for node in model.graph.node if label in node.output)
            raise ValueError(f"{title(maker)} has an output {label!r}, which is not supported")
        if tensor == inputs[0].name:
            raise ValueError(f"{path}: the output {label!r} is the input {tensor!r} itself; nothing is left to compile")
    return Graph(reader.nodes, reader.shapes, inputs[0].name, next(iter(outputs.values())), outputs, pictures)
