"""docs/add_a_kernel.md: its example is a family that is chosen, on any geometry equal to the oracle."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tvm")
from test_deploy import close, convolve, run_nodes

from deploy import targets
from deploy.codegen import program
from deploy.kernels import FAMILIES
from deploy.onnx import graph
from deploy.plan import cost, layout

PAGE = (Path(__file__).parent.parent / "docs" / "add_a_kernel.md").read_text()


@pytest.fixture
def families(monkeypatch) -> list:
    """FAMILIES with the page's family; the code of the page runs as it stands, one block after the other."""
    extended = list(FAMILIES)
    names = {"FAMILIES": extended, "__name__": __name__}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(code, "docs/add_a_kernel.md", "exec"), names)
    monkeypatch.setattr(cost, "FAMILIES", extended)
    return extended


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "k", "stride", "pad"), [(9, 3, 1, 1), (14, 2, 2, 0), (7, 5, 2, 2), (8, 3, 2, 1)])
def test_the_example_is_chosen_and_computes_the_average(families, monkeypatch, size, k, stride, pad, dtype):
    monkeypatch.setattr(layout, "total", lambda costs, nchwc: -len(nchwc))  # alone it would not be worth the reorders
    machine, rng = targets.find_machine(), np.random.default_rng(size)
    if dtype == "bfloat16" and "avx512bf16" not in machine.features:
        pytest.skip("this processor does not multiply bfloat16")
    machine = machine.with_dtype(dtype)
    x = rng.standard_normal((2, 21, size, size)).astype(np.float32)
    ones = np.ones((21, 1, k, k)) / k**2
    pads = {"kernel": (k, k), "stride": (stride, stride), "pad": (pad, pad)}
    expected = convolve(x, ones, np.zeros(21), (stride,) * 2, (pad,) * 4, groups=21)
    shapes = {"x": x.shape, "y": expected.shape}
    node = graph.Window("pool", ["x"], "y", kind="average", activation=("clip", 0.0, None), **pads)
    network = graph.Graph([node], shapes, "x", "y")
    plan = layout.make_plan(cost.CostModel(network, machine))
    assert plan.schedules["y"].family is families[-1]
    names = [name for _, name, _ in program.make_program(network, machine, plan).calls()]
    assert any(name.startswith("nchwc_average_pool") for name in names)
    found, expected = run_nodes([node], shapes, x, machine), np.maximum(expected, 0)
    if dtype == "float32":
        close(found, expected)
    else:  # what is read and what is stored are rounded to 8 bits
        np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-7 * np.abs(x).max())
