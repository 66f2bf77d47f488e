"""deploy/quantise.py: what int8 must keep, and the traps of post-training quantisation that are known."""

import importlib.util
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402
from test_deploy import block_weight, onnx_file  # noqa: E402

import deploy  # noqa: E402
from deploy.tuning import measure  # noqa: E402

n = helper.make_node
RNG = np.random.default_rng(0)
PICTURES = [RNG.standard_normal((1, 8, 6, 6)).astype(np.float32) for _ in range(4)]


def gated_file(path: Path) -> Path:
    """A convolution in blocks of 1x4, hard-swish, squeeze-excite, another convolution and a residual sum."""
    weights = {
        "w": block_weight(RNG, 16, 8, (1, 1), 4, 0.5, False),
        "down": RNG.standard_normal((4, 16, 1, 1)).astype(np.float32),
        "up": RNG.standard_normal((16, 4, 1, 1)).astype(np.float32),
        "v": block_weight(RNG, 16, 16, (3, 3), 4, 0.5, False),
    }
    nodes = [
        n("Conv", ["x", "w"], ["a"], name="first"),
        n("HardSwish", ["a"], ["b"], name="act"),
        n("GlobalAveragePool", ["b"], ["c"], name="squeeze"),
        n("Conv", ["c", "down"], ["d"], name="down"),
        n("Relu", ["d"], ["e"], name="between"),
        n("Conv", ["e", "up"], ["f"], name="up"),
        n("HardSigmoid", ["f"], ["g"], name="gate"),
        n("Mul", ["b", "g"], ["h"], name="excite"),
        n("Conv", ["h", "v"], ["i"], name="second", pads=[1, 1, 1, 1]),
        n("Add", ["i", "h"], ["y"], name="sum"),
    ]
    return onnx_file(path, nodes, weights, (1, 8, 6, 6), rank=4)


def weights_of(model) -> dict[str, np.ndarray]:
    """The int8 weights by the names that they had in float32."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    whole = {name: tensor for name, tensor in tensors.items() if tensor.dtype == np.int8 and tensor.ndim == 4}
    return {re.sub("^q_output_|_1$|_quantized$", "", name): tensor for name, tensor in whole.items()}


def in_float(model) -> set[str]:
    """The names of the operators that read a tensor which is not dequantised."""
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    odd = ("QuantizeLinear", "DequantizeLinear")
    nodes = [node for node in model.graph.node if node.op_type not in odd]
    return {node.name for node in nodes if any(made.get(i) != "DequantizeLinear" for i in node.input if i in made)}


def test_zero_blocks_stay_zero_and_the_gates_stay_float(tmp_path):
    """A zero point in the weights would fill every empty block; 8 bits in the gates cost MobileNet-V3 its accuracy."""
    path = gated_file(tmp_path / "m.onnx")
    model = onnx.load(deploy.quantise(path, PICTURES, tmp_path / "int8.onnx"))
    onnx.checker.check_model(model)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    after = weights_of(model)
    assert after.keys() == {"w", "v"}  # not those of squeeze-excite
    for name, weight in after.items():
        assert (before[name] == 0).mean() > 0.4
        assert not weight[before[name] == 0].any()
    assert in_float(model) >= {"down", "between", "up", "gate", "excite"}
    assert not in_float(model) & {"second", "sum"}
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        assert not (value.dtype == np.int8 and tensor.name.endswith("zero_point") and value.any()), tensor.name
    scales = [t for t in model.graph.initializer if t.name == "w_scale"]
    assert numpy_helper.to_array(scales[0]).shape == (16,)  # one a channel
    images = np.concatenate(PICTURES)
    error, _ = measure.compare(measure.peer(tmp_path / "int8.onnx", 1), measure.peer(path, 1), images, 1)
    assert 0 < error < 0.05


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_every_method_makes_a_file_that_computes_the_same_within_eight_bits(tmp_path, method):
    """The ranges are found a batch at a time: pictures that are forgotten on the way would cut maps off."""
    path = gated_file(tmp_path / "m.onnx")
    scaled = [factor * batch for factor, batch in zip((1, 3, 0.1, 0.1), PICTURES, strict=True)]
    out = deploy.quantise(path, scaled, tmp_path / "int8.onnx", method)
    error, _ = measure.compare(measure.peer(out, 1), measure.peer(path, 1), np.concatenate(scaled), 1)
    assert error < (0.05 if method == "minmax" else 0.5)
    if method == "minmax":  # the second picture alone has the whole range
        alone = deploy.quantise(path, scaled[1:2], tmp_path / "alone.onnx", method)
        scale = [next(t for t in onnx.load(file).graph.initializer if t.name == "x_scale") for file in (out, alone)]
        assert numpy_helper.to_array(scale[0]) == numpy_helper.to_array(scale[1])


def test_layers_stay_float_on_request(tmp_path):
    path = gated_file(tmp_path / "m.onnx")
    model = onnx.load(deploy.quantise(path, PICTURES, tmp_path / "int8.onnx", keep_float=["second"]))
    assert weights_of(model).keys() == {"w"}
    with pytest.raises(ValueError, match=r"--keep_float third: not among the file's nodes, which are first, "):
        deploy.quantise(path, PICTURES, tmp_path / "int8.onnx", keep_float=["third"])


def test_weights_may_share_one_scale_a_layer(tmp_path):
    """Networks exist that lose less so; and what reads the file must know both."""
    path = gated_file(tmp_path / "m.onnx")
    made = onnx.load(deploy.quantise(path, PICTURES, tmp_path / "int8.onnx", per_tensor=True))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    assert tensors["w_scale"].shape == ()
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert not any(weight[before[name] == 0].any() for name, weight in weights_of(made).items())


def one_convolution(path: Path, weight: np.ndarray, bias: np.ndarray) -> Path:
    nodes = [n("Conv", ["x", "w", "b"], ["y"], name="conv")]
    return onnx_file(path, nodes, {"w": weight, "b": bias.astype(np.float32)}, (1, 8, 6, 6), rank=4)


def test_a_bias_far_above_its_weights_does_not_overflow(tmp_path, caplog):
    """The bias is stored in steps of the map's scale times the channel's: with tiny weights it left the range of int32.

    ONNX Runtime before 1.21 clipped it there, which cost a network of others 51 points. Now it widens the channel's
    scale; without that this test fails.
    """
    weight, bias = RNG.standard_normal((8, 8, 1, 1)).astype(np.float32), np.zeros(8)
    weight[3] *= 1e-3
    bias[3] = 250
    path, pictures = one_convolution(tmp_path / "m.onnx", weight, bias), [1e-3 * batch for batch in PICTURES]
    with caplog.at_level(logging.WARNING):
        out = deploy.quantise(path, pictures, tmp_path / "int8.onnx")
    assert "exceeds the range" not in caplog.text
    made, right = (measure.peer(file, 1)(pictures[0]) for file in (out, path))
    np.testing.assert_allclose(made[:, 3], right[:, 3], rtol=0.01)


def test_the_bias_of_a_channel_that_is_pruned_whole_keeps_its_value(tmp_path):
    """Zeros have no range: with the scale 1 that ONNX Runtime takes, a bias below half the map's scale becomes zero."""
    weight, bias = RNG.standard_normal((8, 8, 1, 1)).astype(np.float32), np.zeros(8)
    weight[4:], bias[4:] = 0, 10
    path, pictures = one_convolution(tmp_path / "m.onnx", weight, bias), [1e4 * PICTURES[0]]
    nodes = onnx.load(deploy.quantise(path, pictures, tmp_path / "int8.onnx"))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in nodes.graph.initializer}
    stored = tensors["b_quantized"] * tensors["b_quantized_scale"].astype(np.float64)
    np.testing.assert_allclose(stored, bias, rtol=1e-3)
    assert not tensors["w_quantized"][4:].any()


def test_what_the_file_says_about_its_pictures_is_kept(tmp_path):
    path = gated_file(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.metadata_props.add(key="pictures", value=json.dumps({"size": 6}))
    onnx.save(model, path)
    made = onnx.load(deploy.quantise(path, PICTURES, tmp_path / "int8.onnx"))
    assert [(entry.key, entry.value) for entry in made.metadata_props] == [("pictures", '{"size": 6}')]
    assert {entry.domain for entry in made.opset_import} == {""}


def test_nncf_is_asked_where_it_is_installed(tmp_path):
    pytest.importorskip("nncf")
    path = gated_file(tmp_path / "m.onnx")
    out = deploy.quantise(path, PICTURES, tmp_path / "int8.onnx", quantizer="nncf")
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    weights = weights_of(onnx.load(out))
    assert weights.keys() == {"w", "v"}
    assert not any(weight[before[name] == 0].any() for name, weight in weights.items())
    error, _ = measure.compare(measure.peer(out, 1), measure.peer(path, 1), np.concatenate(PICTURES), 1)
    assert error < 0.3  # it cuts the largest values of four pictures off


def test_mistakes_are_named(tmp_path, monkeypatch):
    path = gated_file(tmp_path / "m.onnx")
    for changes, words in (
        ({"method": "median"}, "--quantise_method median: one of minmax, entropy, percentile"),
        ({"quantizer": "mine"}, "--quantizer mine: one of onnxruntime, nncf"),
        ({"pictures": []}, "needs pictures"),
    ):
        with pytest.raises(ValueError, match=words):
            deploy.quantise(**{"path": path, "pictures": PICTURES, "out": tmp_path / "int8.onnx"} | changes)
    if importlib.util.find_spec("nncf"):
        with pytest.raises(ValueError, match="--per_tensor goes with --quantizer onnxruntime"):
            deploy.quantise(path, PICTURES, tmp_path / "int8.onnx", quantizer="nncf", per_tensor=True)
    monkeypatch.setitem(sys.modules, "nncf", None)  # as if not installed
    with pytest.raises(ValueError, match="pip install nncf"):
        deploy.quantise(path, PICTURES, tmp_path / "int8.onnx", quantizer="nncf")
    assert not (tmp_path / "int8.onnx").exists()
