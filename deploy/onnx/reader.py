"""Read an ONNX file into a Graph.

What is constant is computed here, so a node's inputs are only tensors that depend on the picture. What cannot be read
is a ValueError of one line that names the node.
"""

from pathlib import Path

import numpy as np

from .graph import Graph, Node
from .operators import READERS, name, title

OPSET = 18  # older files are converted to it


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

    def attributes(self, node) -> dict:
        return {a.name: self.attribute_value(a) for a in node.attribute}

    def constant(self, node, index: int, default=None) -> np.ndarray:
        """Input `index`, which must be constant; `default` if it is absent."""
        if index >= len(node.input) or not node.input[index]:
            return default
        if node.input[index] not in self.constants:
            raise ValueError(f"{title(node)} needs a constant {node.input[index]!r}")
        return self.constants[node.input[index]]

    def read(self, node) -> None:
        inputs = [name for name in node.input if name]
        if node.op_type == "Shape" and self.tensor(inputs[0]) in self.shapes:
            start, end = (self.attributes(node).get(k, d) for k, d in (("start", 0), ("end", None)))
            self.constants[node.output[0]] = np.array(self.shapes[self.tensor(inputs[0])][start:end], np.int64)
        elif all(name in self.constants for name in inputs):
            from onnx.reference import ReferenceEvaluator

            values = ReferenceEvaluator(node, opsets=self.opsets).run(
                None, {name: self.constants[name] for name in inputs}
            )
            self.constants.update(zip(node.output, values, strict=True))
        elif node.op_type in READERS:
            READERS[node.op_type](self, node)
        else:
            raise ValueError(f"{title(node)} is not supported; supported are {', '.join(sorted(READERS))}")

    def tensor(self, name: str) -> str:
        return self.alias.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[self.tensor(name)]

    def add(self, make: type, node, inputs: list[str], shape, **fields) -> None:
        self.put(make, node, inputs, node.output[0], shape, **fields)

    def put(self, make: type, node, inputs: list[str], output: str, shape, **fields) -> str:
        """Add a graph node, one of those that the ONNX node becomes."""
        self.nodes.append(make(name(node), [self.tensor(i) for i in inputs], output, **fields))
        self.shapes[output] = tuple(int(length) for length in shape)
        return output


def _modern(model, path):
    """The model without functions of its own, and with operators as opset OPSET or a later one defines them."""
    from onnx import inliner, version_converter

    model = inliner.inline_local_functions(model)
    version = next((entry.version for entry in model.opset_import if entry.domain == ""), OPSET)
    if version >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--onnx_path {path} has opset {version}, and cannot be made {OPSET} ({reason})") from error


def _input_shape(path, tensor, batch: int | None, image_size: tuple[int, int] | None) -> tuple[int, ...]:
    dims = [d.dim_value or d.dim_param or "?" for d in tensor.type.tensor_type.shape.dim]
    told = list(dims)
    if len(dims) == 4 and image_size:
        dims[2:] = [side if isinstance(d, str) else d for d, side in zip(dims[2:], image_size, strict=True)]
        if tuple(dims[2:]) != image_size:
            raise ValueError(f"--image_size {image_size[0]}x{image_size[1]}: {path} was exported for {told}")
    if not dims or any(isinstance(d, str) or d < 1 for d in dims[1:]):
        hint = "--image_size fixes height and width" if len(dims) == 4 else "only the batch may be"
        raise ValueError(f"{path} leaves a size of its input {tensor.name!r} open: {told}; {hint}")
    if isinstance(dims[0], str) or dims[0] < 1:
        dims[0] = batch or 1
    elif batch not in (None, dims[0]):
        raise ValueError(f"--batch {batch}: {path} was exported for a batch of {dims[0]}")
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
    model = _modern(model, path)
    reader = _Reader(model)
    inputs = [i for i in model.graph.input if i.name not in reader.constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ValueError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs; one of each is supported"
        )
    reader.shapes[inputs[0].name] = _input_shape(path, inputs[0], batch, image_size)
    if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise ValueError(f"{path} does not take float32 pictures")
    for node in model.graph.node:
        reader.read(node)
    output = reader.tensor(model.graph.output[0].name)
    if output not in reader.shapes or output == inputs[0].name:
        raise ValueError(f"{path}: the output does not depend on the input")
    return Graph(reader.nodes, reader.shapes, inputs[0].name, output)
