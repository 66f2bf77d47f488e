"""Damaged ONNX files, read and compiled."""

from pathlib import Path
from random import Random

import numpy as np

from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.kind import Kind, Wrong

LARGEST = 1 << 20  # numbers in the input of a network that is run
NO_KERNELS = "ONNX Runtime has no kernels for opsets before 7, and cannot be held against it"


class Networks(Kind):
    """ONNX files with changed attributes, wires, nodes, constants and shapes, or damaged bytes, read into a graph."""

    def prepare(self) -> None:
        self.models = small_networks()
        self.path = self.folder / "damaged.onnx"

    def damage(self, random: Random) -> str:
        model = random.choice(self.models)
        if random.random() < 0.25:
            content, note = mutations.damaged_bytes(model.SerializeToString(), random, head=10**6)
        else:
            model, note = mutations.damaged_model(model, random)
            content = model.SerializeToString()
        self.path.write_bytes(content)
        return note

    def read(self) -> str:
        from deploy.onnx import passes, reader

        graph = passes.simplify(reader.read_onnx(self.path))
        if np.prod([float(n) for n in graph.shapes[graph.input]]) > LARGEST:
            return "a batch of this size is only too large to be held against ONNX Runtime here"
        theirs = onnxruntime_of(self.path)
        if theirs is None:
            return NO_KERNELS
        if graph.shapes[graph.output] != theirs.shape:
            raise Wrong(f"the output is {graph.shapes[graph.output]}, ONNX Runtime's {theirs.shape}")
        return "the output has ONNX Runtime's shape"


class CompiledNetworks(Networks):
    """The same files, compiled, and held against ONNX Runtime."""

    together, seconds = 8, 60.0

    def read(self) -> str:
        import deploy

        library = deploy.compile_onnx(self.path, threads=1)
        theirs = onnxruntime_of(self.path)
        if theirs is None:
            return NO_KERNELS
        ours = library.run(images(library.info["input"]["shape"]))
        scale = np.abs(theirs).max()
        if not np.isfinite(scale):
            return "it computes no finite numbers; the proof of model_tune.py refuses these"
        error = np.abs(ours - theirs).max() if ours.shape == theirs.shape else np.inf
        if not error <= 1e-4 * scale + 1e-7:
            raise Wrong(f"outputs differ by {error:.2g} of {scale:.2g}")
        return "outputs equal ONNX Runtime's"


def small_networks() -> list:
    """onnx.ModelProtos of 8x8 pictures: a residual one, a depthwise one with pools, and one with a constant's chain."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)

    def made(rows: list, shapes: dict[str, tuple]) -> object:
        constants = [
            numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()
        ]
        nodes = [helper.make_node(kind, inputs.split(), [out], name=out, **more) for kind, inputs, out, more in rows]
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 8, 8]), ("y", [1, 5]))]
        graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return model

    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    head = [
        ("GlobalAveragePool", "h", "p", {}),
        ("Flatten", "p", "f", {"axis": 1}),
        ("Gemm", "f wf bf", "y", {"transB": 1}),
    ]
    residual = [
        ("Conv", "x w1 b1", "a", same | {"strides": [2, 2]}),
        ("Relu", "a", "b", {}),
        ("Conv", "b w2", "c", same | {"group": 1, "dilations": [1, 1]}),
        ("Add", "c b", "d", {}),
        ("Relu", "d", "h", {}),
    ]
    depthwise = [
        ("Conv", "x w1 b1", "a", same),
        ("MaxPool", "a", "b", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 0}),
        ("Conv", "b wd", "c", same | {"group": 8}),
        ("BatchNormalization", "c s o m v", "d", {"epsilon": 1e-5}),
        ("Clip", "d low high", "e", {}),
        ("AveragePool", "e", "h", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ]
    wide = {"w1": (8, 3, 3, 3), "b1": (8,), "wf": (5, 8), "bf": (5,)}
    batch_norm = dict.fromkeys("som", (8,))
    models = [
        made(residual + head, wide | {"w2": (8, 8, 3, 3)}),
        made(depthwise + head, wide | {"wd": (8, 1, 3, 3)} | batch_norm),
    ]
    limits = {"low": np.float32(0), "high": np.float32(6), "v": np.linspace(0.5, 2, 8, dtype=np.float32)}
    models[1].graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in limits.items())
    return models


def images(shape) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def onnxruntime_of(path: Path) -> np.ndarray | None:
    """ONNX Runtime's output; None where it has no kernels for the file's opset. Raises Wrong if it refuses the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in entry.shape]
        return session.run(None, {entry.name: images(shape)})[0]
    except Exception as error:  # its exceptions have no common base
        if "NOT_IMPLEMENTED" in str(error):
            return None
        raise Wrong(f"ONNX Runtime refuses it: {' '.join(str(error).split())[-300:]}") from None
