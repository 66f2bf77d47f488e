"""ONNX -> block-sparse kernels -> a library that runs with TVM's runtime alone. Needs no PyTorch.

library = deploy.compile_onnx("model.onnx", threads=2)
logits = library.run(images)        # float32 (B, 3, H, W)
library.save("folder"); deploy.load("folder")
deploy.quantise("model.onnx", pictures, "int8.onnx")  # batches for its ranges
"""

from .compiler import compile_onnx
from .quantise import quantise
from .runtime.library import Library, load

__all__ = ["Library", "compile_onnx", "load", "quantise"]
