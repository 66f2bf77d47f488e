"""deploy/onnx/: what ONNX files may contain, and small versions of torchvision's families."""

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tvm")
from onnx import TensorProto, helper, load, numpy_helper, save
from onnx.reference import ReferenceEvaluator
from test_deploy import agrees, onnx_file

import deploy
from deploy.onnx import passes, reader

n = helper.make_node


def constants(**values) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in values.items()}


def test_smooth_activations(tmp_path):
    nodes = [
        n("Sigmoid", ["x"], ["a"]), n("Mul", ["x", "a"], ["silu"]), n("Mul", ["silu", "hundred"], ["b"]),
        n("LeakyRelu", ["b"], ["c"], alpha=0.2), n("Sigmoid", ["b"], ["d"]), n("Sub", ["c", "hundred"], ["e"]),
        n("Sigmoid", ["e"], ["f"]), n("Add", ["c", "d"], ["g"]), n("Add", ["g", "f"], ["y"]),
    ]  # fmt: skip
    path = onnx_file(tmp_path / "m.onnx", nodes, constants(hundred=np.float32(100)), (2, 3, 5, 7), rank=4)
    agrees(path)
    assert ("swish",) in [node.activation for node in passes.simplify(reader.read_onnx(path)).nodes]


SHAPE = (2, 6, 4, 5)
W = {"w": np.random.default_rng(0).standard_normal((6, 6, 1, 1)).astype(np.float32)}


@pytest.mark.parametrize(
    ("nodes", "values"),
    [
        ([n("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])], {}),
        ([n("Transpose", ["x"], ["y"], perm=[0, 3, 1, 2])], {}),
        ([n("Transpose", ["x"], ["y"], perm=[0, 1, 3, 2])], {}),
        ([n("Transpose", ["x"], ["y"], perm=[0, 1, 2, 3])], {}),
        (
            [
                n("Reshape", ["x", "apart"], ["a"]), n("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
                n("Reshape", ["b", "together"], ["y"]),
            ],
            {"apart": [2, 3, 2, 4, 5], "together": [2, 6, 4, 5]},
        ),
        ([n("Split", ["x", "parts"], ["a", "b"], axis=1), n("Concat", ["b", "a"], ["y"], axis=1)], {"parts": [2, 4]}),
        ([n("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), n("Mul", ["a", "b"], ["y"])], {}),
    ],
    ids=["to last", "to first", "columns", "nothing", "shuffle", "split", "halves"],
)  # fmt: skip
def test_axes_are_moved(tmp_path, nodes, values):
    agrees(onnx_file(tmp_path / "m.onnx", nodes, constants(**values), SHAPE, rank=4))


@pytest.mark.parametrize(
    ("node", "values", "words"),
    [
        (n("Resize", ["x", "", "scales"], ["y"]), {"scales": np.float32([1, 1, 2, 2])}, "Resize"),
        (n("Transpose", ["x"], ["y"], perm=[0, 3, 2, 1]), {}, r"permutes \(2, 6, 4, 5\) by \[0, 3, 2, 1\]"),
        (n("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]), {}, "averages without the padding"),
        (n("ReduceMean", ["x", "axes"], ["y"]), {"axes": [1]}, "no mean over height and width"),
        (n("Add", ["x", "map"], ["y"]), {"map": np.ones((4, 5), np.float32)}, "only one number, or one a channel"),
        (n("Softmax", ["x"], ["y"], name="last"), {}, r"node 'last' \(operator Softmax\)"),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else "",
)
def test_what_is_not_supported_is_named(tmp_path, node, values, words):
    path = onnx_file(tmp_path / "m.onnx", [node], constants(**values), SHAPE, rank=4)
    with pytest.raises(ValueError, match=words) as caught:
        reader.read_onnx(path)
    assert "\n" not in str(caught.value)


DAMAGED = {  # nodes that no network has, and what is said of them
    "stride": ([n("Conv", ["x", "w"], ["y"], strides=[0, 0])], "strides"),
    "dilation": ([n("Conv", ["x", "w"], ["y"], dilations=[0, 1])], "dilations"),
    "pool": ([n("MaxPool", ["x"], ["y"], kernel_shape=[0, 0])], "kernel_shape"),
    "negative": ([n("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], pads=[-1, 0, 0, 0])], "pads"),
    "1d": ([n("MaxPool", ["x"], ["y"], kernel_shape=[2])], "kernel_shape has incorrect size"),
    "window": ([n("MaxPool", ["x"], ["y"], kernel_shape=[10**6] * 2, pads=[10**6] * 4)], "a window of"),
    "border": ([n("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], pads=[10**6] * 4)], "holds more than"),
    "pad": ([n("Pad", ["x", "far"], ["y"])], "holds more than"),
    "long": ([n("Pad", ["x", "down"], ["y"])], "a map of 1000004 x 5"),
    "bomb": ([n("ConstantOfShape", ["size"], ["b"]), n("ReduceMax", ["b"], ["m"], keepdims=0),
              n("Mul", ["x", "m"], ["y"])], r"'b' \(operator ConstantOfShape\) makes .* holds more than \d+ values$"),
    "expand": ([n("Expand", ["ones", "size"], ["b"]), n("ReduceMax", ["b"], ["m"], keepdims=0),
                n("Mul", ["x", "m"], ["y"])], "operator Expand"),
    "groups": ([n("Conv", ["x", "w"], ["y"], group=4)], "in 4 groups"),
    "channels": ([n("Conv", ["x", "narrow"], ["y"])], "do not fit 6 channels"),
    "auto_pad": ([n("Conv", ["x", "w"], ["y"], auto_pad="WIDE")], "auto_pad 'WIDE'"),
    "reshape": ([n("Reshape", ["x", "ten"], ["y"])], "another number"),
    "training": ([n("BatchNormalization", ["x", *["six"] * 4], ["y", "m", "v"], training_mode=1)], "training mode"),
    "dropout": ([n("Dropout", ["x", "half", "true"], ["y"])], "training mode"),
    "mask": ([n("Dropout", ["x"], ["a", "m"]), n("Add", ["a", "m"], ["y"])], "'m' is an output that is not supported"),
    "column": ([n("GlobalAveragePool", ["x"], ["p"]), n("Flatten", ["p"], ["f"]),
                n("Gemm", ["f", "two", "each"], ["y"])], r"'y' \(operator Gemm\) has a bias of shape \(2, 1\)"),
    "empty": ([n("Slice", ["x", "ten", "ten"], ["y"])], "which holds no values"),
    "axis": ([n("Concat", ["x", "x"], ["y"], axis=2**63 - 1)], "an axis 9223372036854775807"),
    "splits": ([n("Split", ["x"], ["y"], axis=1, num_outputs=2**40)], "num_outputs 1099511627776 and 1 outputs"),
    "kernel": ([n("Conv", ["x", "w"], ["y"], kernel_shape=[3, 1], pads=[1, 0, 1, 0])], r"kernel_shape \[3, 1\] and a"),
    "pads": ([n("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], pads=[0, 2, 0, 2])], "each must be less than"),
    "norm": ([n("BatchNormalization", ["x", *["three"] * 4], ["y"])], "does not fit its inputs"),
    "all": ([n("Softsign", ["x"], ["a"], name="first"), n("Relu", ["a"], ["b"]),
             n("Softmax", ["b"], ["c"], name="second"), n("MaxPool", ["x"], ["d"], kernel_shape=[0, 0]),
             n("Add", ["c", "d"], ["y"])], "kernel_shape.*'first' .*Softsign.*'second' .*Softmax"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_at_once_in_one_line(tmp_path, kind):
    """These crashed, filled the memory or ran for minutes; and all that is wrong with a file is told together."""
    nodes, words = DAMAGED[kind]
    values = {"far": [0, 0, 10**6, 10**6] * 2, "size": [10**6, 10**6], "ten": [10], "ones": np.ones((1, 1), np.float32)}
    values |= {"down": [0] * 6 + [10**6, 0]}
    values |= {"half": np.float32(0.5), "true": np.True_}
    values |= {"two": np.ones((6, 2), np.float32), "each": np.ones((2, 1), np.float32)}  # one a picture, not a feature
    values |= {"six": np.ones(6, np.float32), "three": np.ones(3, np.float32)}
    values |= {"w": np.ones((6, 6, 1, 1), np.float32), "narrow": np.ones((6, 5, 1, 1), np.float32)}
    values = {name: value for name, value in values.items() if any(name in node.input for node in nodes)}
    path = onnx_file(tmp_path / "m.onnx", nodes, constants(**values), SHAPE, rank=4)
    with pytest.raises(ValueError, match=words) as caught:
        reader.read_onnx(path)
    assert "\n" not in str(caught.value)


def test_operators_of_other_domains_are_not_taken_for_onnx_ones(tmp_path):
    path = onnx_file(tmp_path / "m.onnx", [n("Relu", ["x"], ["y"], name="theirs")], {}, SHAPE, rank=4)
    model = load(path)
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    save(model, path)
    with pytest.raises(ValueError, match=r"'theirs' \(operator Relu\) is of domain 'com\.example'"):
        reader.read_onnx(path)


@pytest.mark.parametrize("role", ["input", "output"])
def test_only_float32_is_taken_and_put_out(tmp_path, role):
    """A file that declares its output as another type is none that ONNX Runtime reads."""
    path = onnx_file(tmp_path / "m.onnx", [n("Relu", ["x"], ["y"])], {}, SHAPE, rank=4)
    model = load(path)
    getattr(model.graph, role)[0].type.tensor_type.elem_type = TensorProto.INT16
    save(model, path)
    with pytest.raises(ValueError, match="as INT16; only FLOAT"):
        reader.read_onnx(path)


@pytest.mark.parametrize("shape", [(1, 3, 10**6, 10**6), (1, 3, 1, 10**6), (10**6, 3, 224, 224)])
def test_inputs_of_huge_size_are_refused(tmp_path, shape):
    """They would take minutes to compile."""
    path = onnx_file(tmp_path / "m.onnx", [n("Relu", ["x"], ["y"])], {}, shape, rank=4)
    with pytest.raises(ValueError, match="too large to be compiled"):
        reader.read_onnx(path)


@pytest.mark.parametrize("axis", range(4), ids=["batch", "channels", "height", "width"])
def test_a_size_of_zero_is_refused_and_a_negative_one_is_open(tmp_path, axis):
    """A batch of 0 was taken for an open one: ONNX Runtime takes 0 pictures there, and any number where it reads -1."""
    zero, negative = ([*SHAPE[:axis], length, *SHAPE[axis + 1 :]] for length in (0, -1))
    path = onnx_file(tmp_path / "m.onnx", [n("Relu", ["x"], ["y"])], {}, zero, rank=4)
    with pytest.raises(ValueError, match=r"^\S+ has a size of 0 in its input 'x': .*at least 1, or open$"):
        reader.read_onnx(path, image_size=(4, 5))
    path = onnx_file(tmp_path / "m.onnx", [n("Relu", ["x"], ["y"])], {}, negative, rank=4)
    if axis == 1:
        with pytest.raises(ValueError, match="leaves a size of its input 'x' open"):
            reader.read_onnx(path, batch=2, image_size=(4, 5))
    else:
        assert reader.read_onnx(path, batch=2, image_size=(4, 5)).shapes["y"] == SHAPE


def test_sums_and_products_with_itself_and_with_numbers(tmp_path):
    nodes = [
        n("Conv", ["x", "w"], ["a"]), n("Add", ["a", "a"], ["b"]), n("Relu", ["b"], ["c"]),
        n("Mul", ["c", "two"], ["d"]), n("Mul", ["d", "d"], ["e"]), n("Mul", ["two", "e"], ["y"]),
    ]  # fmt: skip
    agrees(onnx_file(tmp_path / "m.onnx", nodes, constants(two=np.float32(2), **W), SHAPE, rank=4))


@pytest.mark.parametrize("first", ["Mul", "Conv"])
def test_what_one_node_reads_twice_is_kept(tmp_path, first):
    """A scale, or a depthwise convolution, was moved into the node behind it, which then lacked its other operand."""
    rng = np.random.default_rng(0)
    values = {"k": rng.standard_normal((6, 1, 3, 3)).astype(np.float32), **W, **constants(two=np.float32(2))}
    nodes = {
        "Mul": [n("Mul", ["x", "two"], ["a"]), n("Add", ["a", "a"], ["y"])],
        "Conv": [
            n("Conv", ["x", "k"], ["a"], group=6, pads=[1, 1, 1, 1]), n("Conv", ["a", "w"], ["b"]),
            n("Add", ["b", "a"], ["y"]),
        ],
    }  # fmt: skip
    agrees(onnx_file(tmp_path / "m.onnx", nodes[first], values, SHAPE, rank=4))


def test_sparse_initialisers_are_weights(tmp_path):
    """The standard's own way to store a pruned weight, with linear places and with one column an axis."""
    kept = np.flatnonzero(np.arange(36) % 3)
    sparse = np.where(np.arange(36) % 3, W["w"].reshape(-1), 0).reshape(6, 6, 1, 1).astype(np.float32)
    for places in (kept, np.stack(np.unravel_index(kept, sparse.shape), axis=1)):
        values = helper.make_tensor("w", TensorProto.FLOAT, [len(kept)], sparse.reshape(-1)[kept])
        at = helper.make_tensor("places", TensorProto.INT64, places.shape, places.reshape(-1))
        made = helper.make_graph(
            [n("Conv", ["x", "w"], ["y"])], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
            sparse_initializer=[helper.make_sparse_tensor(values, at, sparse.shape)],
        )  # fmt: skip
        save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "m.onnx")
        (node,) = reader.read_onnx(tmp_path / "m.onnx").nodes
        np.testing.assert_array_equal(node.weight, sparse)


def test_image_size_fixes_the_middle_of_an_nhwc_input(tmp_path):
    nodes = [n("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), n("Relu", ["t"], ["y"])]
    path = onnx_file(tmp_path / "m.onnx", nodes, {}, ("N", "h", "w", 3), rank=4)
    with pytest.raises(ValueError, match="--image_size fixes"):
        reader.read_onnx(path)
    assert reader.read_onnx(path, image_size=(8, 6)).shapes["y"] == (1, 3, 8, 6)


FAMILIES = {
    "densenet": lambda models: models.densenet.DenseNet(4, (2, 2), 8, num_classes=10),
    "efficientnet": lambda models: models.efficientnet.EfficientNet(
        [models.efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1), models.efficientnet.MBConvConfig(4, 5, 2, 8, 16, 2)],
        0.2, last_channel=32,
    ),
    "googlenet": lambda models: models.GoogLeNet(10, init_weights=False).inception3a,
    "regnet": lambda models: models.regnet.RegNet(
        models.regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25), stem_width=8
    ),
    "resnext": lambda models: models.resnet.ResNet(
        models.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4
    ),
    "shufflenet": lambda models: models.shufflenetv2.ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 64]),
    "squeezenet": lambda models: models.squeezenet.SqueezeNet("1_1"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_onnx_runtime(tmp_path, family):
    """A small member of each of torchvision's families that imagenet.py does not train."""
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    network = FAMILIES[family](models).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path / "model.onnx"
    image = torch.randn(1, 192 if family == "googlenet" else 3, 33, 40)
    torch.onnx.export(network, (image,), str(path), dynamo=True, external_data=False, verbose=False)
    agrees(path)


OLD = {  # what later opsets write otherwise: nodes, and the opsets to try
    "clip": ([n("Clip", ["c"], ["y"], min=-0.5, max=1.0)], (6, 10)),
    "mean": ([n("ReduceMean", ["c"], ["y"], axes=[2, 3])], (7, 13)),
    "squeeze": ([n("GlobalAveragePool", ["c"], ["m"]), n("Squeeze", ["m"], ["y"], axes=[2, 3])], (7, 11)),
    "split": ([n("Split", ["c"], ["y", "z"], axis=1, split=[2, 4])], (7, 11)),
    "slice": ([n("Slice", ["c"], ["y"], axes=[2], starts=[1], ends=[3])], (7, 9)),
    "pad": ([n("Pad", ["c"], ["y"], pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.5)], (7, 10)),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "opset"), [(kind, opset) for kind, (_, opsets) in OLD.items() for opset in opsets])
def test_old_opsets_mean_what_they_meant(tmp_path, kind, opset):
    """An attribute that became an input, or a default that changed, would be overlooked in silence."""
    nodes, _ = OLD[kind]
    made = helper.make_graph(
        [n("Conv", ["x", "w"], ["c"]), *nodes], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (2 if kind == "squeeze" else 4))],
        [numpy_helper.from_array(W["w"], "w")],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    save(model, tmp_path / "m.onnx")
    found = deploy.compile_onnx(tmp_path / "m.onnx", threads=1).run(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_functions_of_the_file_are_inlined(tmp_path):
    body = [n("Conv", ["a", "w"], ["c"]), n("Relu", ["c"], ["b"])]
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    block = helper.make_function("own", "Block", ["a", "w"], ["b"], body, opset[:1])
    made = helper.make_graph(
        [n("Block", ["x", "w"], ["h"], domain="own"), n("Block", ["h", "w"], ["y"], domain="own")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)], [numpy_helper.from_array(W["w"], "w")],
    )  # fmt: skip
    save(helper.make_model(made, opset_imports=opset, functions=[block], ir_version=9), tmp_path / "m.onnx")
    agrees(tmp_path / "m.onnx")
