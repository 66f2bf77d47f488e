"""A float32 ONNX file in int8, by the quantiser of ONNX Runtime or by NNCF: post-training, with a few pictures.

The file that is written holds pairs of QuantizeLinear and DequantizeLinear (QDQ): maps in uint8, weights in int8 with a
scale of its own for every output channel (or one a layer) and no zero point, so that a weight of zero is exactly zero
and pruned blocks stay empty. ONNX Runtime and OpenVINO run it. Wherever a map is multiplied by what was computed from
that map (squeeze-excite, hard-swish, swish), the gate and the product stay float32: they are cheap, and 8 bits cost
accuracy.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

from utils.files import atomic

if TYPE_CHECKING:
    import numpy as np
    import onnx

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}  # as ONNX Runtime calls them
MOST_NAMED = 8  # valid names that an error lists
OPSET = 13  # the first with a scale a channel
# ONNX Runtime gives a channel of zeros the scale 1, and its bias the scale of the map: a step that may be larger than
# the bias. With a range, however narrow, the bias keeps its value.
LEAST_RANGE = 1e-4


class NotQuantised(ValueError):
    """The quantiser cannot read the network, or gave up."""


def quantise(
    path: str | Path,
    pictures: "Sequence[np.ndarray]",
    out: str | Path,
    method: str = "minmax",
    keep_float: Iterable[str] = (),
    quantizer: str = "onnxruntime",
    per_tensor: bool = False,
) -> Path:
    """Write the network of the ONNX file `path` in int8 to `out`, and return that path.

    Args:
        pictures: batches to find the ranges of the maps with, float32 (B, C, H, W), prepared as for evaluation. They
            should be of all classes, and none that accuracy is measured on. B is the file's batch, or any if it has
            none; 1 needs the least memory.
        method: how the range of a map follows from its values: one of METHODS.
        keep_float: nodes of the file that are computed in float32, by name.
        quantizer: "onnxruntime", or "nncf", with its slow and exact bias correction and its own method and scales.
        per_tensor: one scale for all weights of a layer instead of one for every output channel.

    Raises:
        ValueError: an unknown method, quantiser or node, a missing package, or no pictures.
        NotQuantised: the quantiser failed.
    """
    if method not in METHODS:
        raise ValueError(f"--quantise_method {method}: one of {', '.join(METHODS)}")
    if quantizer not in QUANTIZERS:
        raise ValueError(f"--quantizer {quantizer}: one of {', '.join(QUANTIZERS)}")
    if not len(pictures):
        raise ValueError("int8 needs pictures to find the ranges of the maps with")
    with _explained(path):
        network, facts = _prepared(path)
    kept = gates(network) | _named(network, keep_float)
    with _explained(path):
        made = QUANTIZERS[quantizer](network, list(pictures), sorted(kept), method, per_tensor)
    used = {node.domain for node in made.graph.node}
    for entry in [entry for entry in made.opset_import if entry.domain and entry.domain not in used]:
        made.opset_import.remove(entry)  # ONNX Runtime declares all domains that it knows
    del made.metadata_props[:]
    made.metadata_props.extend(facts)
    with atomic(Path(out)) as file:
        file.write(made.SerializeToString())
    return Path(out)


def gates(network: "onnx.ModelProto") -> set[str]:
    """The names of all products of a map with what was computed from that map alone, and of what computes it."""
    makers = {output: node for node in network.graph.node for output in node.output}
    constants = {tensor.name for tensor in network.graph.initializer} | {""}

    def between(start: str, end: str) -> set[str] | None:
        """The nodes on the ways from tensor `start` to tensor `end`; None if `end` depends on anything else, too."""
        found, asked = set(), [end]
        while asked:
            tensor = asked.pop()
            if tensor == start or tensor in constants:
                continue
            if tensor not in makers:
                return None  # a picture
            node = makers[tensor]
            if node.name not in found:
                found.add(node.name)
                asked += node.input
        return found

    kept = set()
    for node in network.graph.node:
        if node.op_type == "Mul" and not constants.intersection(node.input):
            for source, gate in permutations(node.input):
                kept |= {node.name, *found} if (found := between(source, gate)) is not None else set()
    return kept


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """What the quantisers raise, of many kinds, as one line, without what they log before; a `_Missing` as it is."""
    log = logging.getLogger("onnxruntime.quantization")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except _Missing:
        raise
    except Exception as error:
        raise NotQuantised(f"{path} cannot be quantised ({' '.join(str(error).split())[:200]})") from error
    finally:
        log.setLevel(level)


class _Missing(ValueError):
    """A package is not installed, or has no such method."""


def _prepared(path: str | Path) -> tuple["onnx.ModelProto", list]:
    """The network with shapes, normalisation folded into convolutions and a name for every node; and its metadata."""
    try:
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise _Missing("int8 needs ONNX Runtime: pip install onnx onnxruntime") from error

    model = onnx.load(str(path))
    facts = list(model.metadata_props)
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        if next((entry.version for entry in model.opset_import if entry.domain == ""), OPSET) < OPSET:
            path = Path(folder) / "newer.onnx"
            onnx.save(onnx.version_converter.convert_version(model, OPSET), path)
        # Symbolic shapes are for transformers, and would need sympy and seconds.
        quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        network = onnx.load(ready)
    for node in network.graph.node:
        node.name = node.name or node.output[0]  # ONNX Runtime expands some operators, and leaves the parts nameless
    return network, facts


def _named(network: "onnx.ModelProto", names: Iterable[str]) -> set[str]:
    names, known = set(names), [node.name for node in network.graph.node]
    if unknown := sorted(names - set(known)):
        some = ", ".join(known[:MOST_NAMED]) + (", ..." if len(known) > MOST_NAMED else "")
        raise ValueError(f"--keep_float {' '.join(unknown)}: not among the file's nodes, which are {some}")
    return names


def _input(network: "onnx.ModelProto") -> str:
    constants = {tensor.name for tensor in network.graph.initializer}
    return next(tensor.name for tensor in network.graph.input if tensor.name not in constants)


def _by_onnxruntime(
    network: "onnx.ModelProto", pictures: list, kept: list[str], method: str, per_tensor: bool
) -> "onnx.ModelProto":
    import onnx
    from onnxruntime import quantization

    name = _input(network)

    class Reader(quantization.CalibrationDataReader):
        """The pictures, batch by batch; ONNX Runtime asks for the range of batches that it holds in memory."""

        batches = iter(pictures)

        def __len__(self) -> int:
            return len(pictures)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.batches = iter(pictures[start_index:end_index])

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    # The stride makes it work off a batch at a time: it would hold all maps of all pictures in memory otherwise.
    options = {"WeightSymmetric": True, "CalibStridedMinMax": 1, "MinimumRealRange": LEAST_RANGE}
    options["OpTypesToExcludeOutputQuantization"] = ["Gemm", "MatMul"]  # classes that are close would get equal logits
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quantization.quantize_static(
            network,
            Path(folder) / "int8.onnx",
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=not per_tensor,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=kept,
            calibrate_method=quantization.CalibrationMethod[METHODS[method]],
            extra_options=options,
        )
        return onnx.load(Path(folder) / "int8.onnx")


def _by_nncf(
    network: "onnx.ModelProto", pictures: list, kept: list[str], method: str, per_tensor: bool
) -> "onnx.ModelProto":
    try:
        import nncf
    except ImportError as error:
        raise _Missing("--quantizer nncf needs NNCF: pip install nncf") from error
    if method != "minmax" or per_tensor:
        flag = "--per_tensor" if per_tensor else f"--quantise_method {method}"
        raise _Missing(f"{flag} goes with --quantizer onnxruntime: NNCF chooses that itself")
    nncf.set_log_level(logging.ERROR)
    name = _input(network)
    return nncf.quantize(
        network,
        nncf.Dataset(pictures, lambda batch: {name: batch}),
        preset=nncf.QuantizationPreset.MIXED,  # maps with a zero point, weights without
        subset_size=len(pictures),
        fast_bias_correction=False,  # the fast one costs MobileNet-V3-small at half width 15 points of top-1
        ignored_scope=nncf.IgnoredScope(names=kept),
    )


QUANTIZERS = {"onnxruntime": _by_onnxruntime, "nncf": _by_nncf}
