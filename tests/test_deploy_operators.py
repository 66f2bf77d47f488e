"""Every operator of deploy/onnx/ at every opset that changed it, by the node tests that the onnx package brings.

The opset that defines an operator last is held against the package's own outputs, an older one against ONNX Runtime.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("tvm")
from onnx import checker, defs, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import deploy  # noqa: E402
from deploy.onnx import operators, reader  # noqa: E402

OLDEST = 7  # the first opset that ONNX Runtime reads
RENAMED = {"constant_value": "value"}  # an input of Pad, and the attribute that it was

MAP = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
CHANNELS = np.float32([-2, 0.5, 3]).reshape(3, 1, 1)
OURS = [  # the package has none of these with a map of four axes
    *((helper.make_node(name, ["x", "c"], ["y"]), {"c": CHANNELS}) for name in ("Add", "Sub", "Mul", "Div")),
    (helper.make_node("Concat", ["x", "x"], ["y"], axis=1), {}),
    (helper.make_node("Pad", ["x", "p", "v"], ["y"]), {"p": np.array([0, 0, 1, 0, 0, 2, 1, 0]), "v": np.float32(0.5)}),
    (helper.make_node("ReduceMean", ["x", "a"], ["y"]), {"a": np.array([2, 3])}),
]


def opsets() -> dict[str, list[int]]:
    """The opsets to try of every operator: the oldest, those that changed it, and the newest."""
    changed = {name: {OLDEST, defs.onnx_opset_version()} for name in operators.READERS}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.name in changed and schema.since_version > OLDEST:
            changed[schema.name].add(schema.since_version)
    return {name: sorted(versions) for name, versions in changed.items()}


@dataclass
class Case:
    """A node as this opset writes it, and its tensors by name."""

    name: str
    node: onnx.NodeProto
    opset: int
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@cache
def cases() -> dict[str, list[Case]]:
    """By operator: the package's cases of one node and of tensors alone, and ours."""
    from onnx.backend.test.case.node import collect_testcases

    found = defaultdict(list)
    for case in collect_testcases(None):
        (inputs, outputs), graph = case.data_sets[0], case.model.graph
        if len(graph.node) == 1 and all(isinstance(value, np.ndarray) for value in inputs):
            tensors = [
                {entry.name: value for entry, value in zip(*pair, strict=True)}
                for pair in ((graph.input, inputs), (graph.output, outputs))
            ]
            node = graph.node[0]
            found[node.op_type].append(Case(case.name, node, case.model.opset_import[0].version, *tensors))
    for node, constants in OURS:
        (output,) = ReferenceEvaluator(node).run(None, inputs := {"x": MAP, **constants})
        opset = defs.get_schema(node.op_type).since_version
        found[node.op_type].append(Case(f"our {node.op_type}", node, opset, inputs, {"y": output}))
    return found


def as_of(case: Case, opset: int) -> onnx.NodeProto | None:
    """The node as an older opset writes it, with attributes for inputs. None if that opset cannot say it."""
    node = case.node
    if not defs.has(node.op_type, opset, ""):
        return None
    new, old = (defs.get_schema(node.op_type, version, "") for version in (case.opset, opset))
    made = onnx.NodeProto()
    made.CopyFrom(node)
    del made.attribute[:], made.input[1:]
    for attribute in node.attribute:
        default = new.attributes[attribute.name].default_value
        if attribute.name in old.attributes:
            made.attribute.append(attribute)
        elif not default.type or helper.get_attribute_value(default) != helper.get_attribute_value(attribute):
            return None
    for name, entry in zip(node.input[1:], [*new.inputs[1:], *[new.inputs[-1]] * len(node.input)], strict=False):
        label = RENAMED.get(entry.name, entry.name)
        if label not in old.attributes:
            made.input.append(name)
        elif name:
            made.attribute.append(
                helper.make_attribute(label, case.inputs[name].tolist(), attr_type=old.attributes[label].type)
            )
    return made


def models(operator: str, opset: int) -> Iterator[tuple[str, object, dict, dict | None]]:
    """(name, model, picture, right outputs) of every case, with each input in turn as the picture, the others constant.

    1 is added to each float32 output, so that a node that passes its input through leaves a network. The right outputs
    are None where this opset is older than the case's.
    """
    one = numpy_helper.from_array(np.float32(1), "one")
    imports = [helper.make_opsetid("", opset)]
    version = max(8, helper.find_min_ir_version_for(imports, ignore_unknown=True))
    for case in cases()[operator]:
        node = as_of(case, opset) if opset < case.opset else case.node
        added = [name for name, value in case.outputs.items() if value.dtype == np.float32]
        right = {name: value for name, value in case.outputs.items() if name not in added}
        right |= {f"{name}+1": case.outputs[name] + np.float32(1) for name in added}
        sums = [helper.make_node("Add", [name, "one"], [f"{name}+1"]) for name in added]
        for picture in filter(None, node.input if node else ()):
            constants = {k: v for k, v in case.inputs.items() if k != picture and k in node.input}
            constants = [numpy_helper.from_array(value, name) for name, value in constants.items()]
            inputs = {picture: case.inputs[picture]}
            ends = [[described(*entry) for entry in tensors.items()] for tensors in (inputs, right)]
            made = helper.make_graph([node, *sums], "g", *ends, [*constants, one])
            model = helper.make_model(made, opset_imports=imports, ir_version=version)
            yield case.name, model, inputs, right if opset >= case.opset else None


def described(name: str, value: np.ndarray):
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def valid(model) -> bool:
    try:
        checker.check_model(model)
    except checker.ValidationError:
        return False
    return True


def onnxruntime_of(model, picture: dict) -> dict | None:
    """Its outputs; None if it refuses the model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # its exceptions have no common base
        return None
    return dict(zip([y.name for y in session.get_outputs()], session.run(None, picture), strict=True))


def attempt(path) -> tuple[object | None, str]:
    """The graph, or why there is none."""
    try:
        return reader.read_onnx(path), ""
    except ValueError as error:
        return None, str(error)


COMPILED: dict[tuple, deploy.Library] = {}  # by graph: most opsets read the same one


def compiled(path, graph) -> deploy.Library:
    arrays = [value.tobytes() for node in graph.nodes for value in vars(node).values() if isinstance(value, np.ndarray)]
    key = graph.script(), *arrays
    if key not in COMPILED:
        COMPILED[key] = deploy.compile_onnx(path, threads=1)
    return COMPILED[key]


@pytest.mark.filterwarnings("ignore")  # of NumPy, where the package computes limits
@pytest.mark.parametrize(
    ("operator", "opset"),
    [
        pytest.param(operator, opset, marks=() if opset == OLDEST else pytest.mark.slow)
        for operator, versions in opsets().items()
        for opset in versions
        if opset > OLDEST or defs.has(operator, OLDEST, "")
    ],
)
def test_nodes_are_read_rightly_or_refused_by_name(tmp_path, operator, opset):
    """An attribute, input or default that one opset has and another has not would be overlooked in silence."""
    read, path = 0, tmp_path / "m.onnx"
    for name, model, picture, right in models(operator, opset):
        if not valid(model):
            continue
        onnx.save(model, path)
        graph, message = attempt(path)
        if graph is None:
            assert "\n" not in message, name
            assert any(word in message for word in (f"(operator {operator})", "its input '", "its output '")), name
            continue
        right = onnxruntime_of(model, picture) if right is None else right
        if right is None:
            continue
        ours = compiled(path, graph).run(picture)
        for output, value in right.items():
            found = ours[output] if isinstance(ours, dict) else ours
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5, err_msg=name)
        read += 1
    assert read
