"""Quantised ONNX files written by hand: QuantizeLinear and DequantizeLinear around every tensor."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class File:
    """Nodes and constants of a file in the making. Every method returns the name of the tensor that it makes."""

    def __init__(self):
        self.nodes, self.constants = [], {}

    def constant(self, name: str, value) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _pair(self, name: str, scale, zero) -> list[str]:
        scale = self.constant(f"{name}_scale", np.float32(scale))
        return [scale, *([] if zero is None else [self.constant(f"{name}_zero", zero)])]

    def rounded(self, x: str, name: str, scale: float, zero) -> str:
        """A map on a grid; zero: of the type of the numbers, or None for uint8 without a zero point."""
        facts = self._pair(name, scale, zero)
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, *facts], name), *facts], f"{name}_meant")

    def weight(self, name: str, numbers: np.ndarray, scale, zero=None, axis: int = 0, **more) -> str:
        """Integers as the float32 numbers that they mean."""
        whole, facts = self.constant(f"{name}_whole", numbers), self._pair(name, scale, zero)
        return self.node("DequantizeLinear", [whole, *facts], name, axis=axis, **more)

    def save(self, path: Path, shape: tuple[int, ...], *outputs: str, axes: int = 4, opset: int = 18) -> Path:
        """The file with pictures `x` of this shape, and outputs of so many axes."""
        made = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * axes) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )  # fmt: skip
        imports = [helper.make_opsetid("", opset)]
        onnx.save(helper.make_model(made, opset_imports=imports, ir_version=9 if opset < 21 else 10), str(path))
        return path
