"""deploy/targets.py, deploy/tuning/core.py: features are the processor's own, and an unknown core is measured."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tvm")
import tvm
from test_deploy import block_weight, everything, small_file

import deploy
from deploy import targets
from deploy.onnx import graph, passes
from deploy.plan import cost, layout
from deploy.runtime import processor
from deploy.tuning import core

AVX512 = {"avx", "avx2", "fma", "bmi", "bmi2", "lzcnt", "popcnt", "movbe", "f16c", "ssse3", "sse4.1", "sse4.2", "gfni"}
AVX512 |= {f"avx512{name}" for name in ("f", "cd", "bw", "dq", "vl", "ifma", "vbmi", "vbmi2", "vnni", "bitalg")}
AVX512 |= {"avx512vpopcntdq"}


def native(monkeypatch, cpu: str, features: set[str]) -> targets.Machine:
    """The machine of a computer that LLVM takes for `cpu` and whose processor says it has `features`."""
    target = {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": cpu}
    monkeypatch.setattr(tvm.target.Target, "from_device", lambda _: tvm.target.Target(target))
    monkeypatch.setattr(processor, "features", lambda: frozenset(features))
    return targets.find_machine()


def test_a_virtual_machine_that_is_called_otherwise_keeps_its_features(monkeypatch):
    """A Sapphire Rapids that calls itself Rocket Lake: LLVM would leave out its matrix units and bfloat16."""
    extra = {"amx-tile", "amx-bf16", "amx-int8", "avx512bf16", "avxvnni"}
    machine = native(monkeypatch, "rocketlake", AVX512 | extra)
    assert extra <= machine.features
    assert "+amx-bf16" in str(machine.target)
    assert "-prefer-256-bit" in str(machine.target)
    assert not machine.known  # so it is measured


def test_features_that_the_name_promises_but_the_processor_lacks_are_not_used(monkeypatch):
    hidden = {name for name in AVX512 if not name.startswith("avx512")}
    machine = native(monkeypatch, "znver4", hidden)
    assert (machine.lanes, machine.registers) == (8, 16)
    for dtype in ("bfloat16", "int8"):
        with pytest.raises(ValueError, match=f"dtype {dtype}: native has none of"):
            machine.with_dtype(dtype)
    assert not machine.known  # a Zen 4 without AVX-512 is none that kernels were fitted to


def test_a_known_processor_is_not_measured(monkeypatch):
    machine = native(monkeypatch, "znver4", AVX512 | {"avx512bf16"})
    assert machine.known
    assert machine.core == targets.CORES["znver4"].core
    assert targets.find_machine('{"kind": "llvm", "mcpu": "znver5"}').core.l1_bytes == 48 * 1024  # published is enough


def test_a_library_says_what_it_needs_and_is_refused_without_it(tmp_path, monkeypatch):
    deploy.compile_onnx(small_file(tmp_path / "m.onnx"), threads=1).save(tmp_path / "out")
    needs = json.loads((tmp_path / "out" / "deploy.json").read_text())["requires"]
    assert needs["architecture"] == processor.architecture()
    assert set(needs["features"]) <= (processor.features() or set(needs["features"]))
    monkeypatch.setattr(processor, "features", lambda: frozenset({"sse4.1"}))
    if needs["features"]:
        with pytest.raises(ValueError, match=rf"lacks .*{needs['features'][0]}"):
            deploy.load(tmp_path / "out")


def test_the_measured_core_is_kept_beside_the_tune_file(tmp_path, monkeypatch):
    measured = targets.Core(multiply_adds=1.5, l3_rate=12)
    monkeypatch.setattr(core, "_this_core", lambda: measured)
    machine, tune = targets.find_machine(), tmp_path / "tuned.json"
    assert core.described(machine).core == measured
    assert core.described(machine, tune).core == measured
    monkeypatch.setattr(core, "_this_core", None)  # nothing is measured again
    assert core.described(machine, tune).core == measured
    monkeypatch.setattr(targets, "CORES", {})
    assert deploy.compile_onnx(small_file(tmp_path / "m.onnx"), tune=tune).info["core"] == asdict(measured)
    (tmp_path / "tuned.core.json").write_text("{}")
    with pytest.raises(ValueError, match="is no file of a measured core"):
        core.described(machine, tune)


@pytest.fixture(scope="module")
def measured() -> targets.Core:
    return core.measure(targets.find_machine())


def test_measured_facts_are_those_of_a_processor(measured):
    """Of any one that was ever built: a broken micro-kernel that LLVM folds away would fall out of these ranges."""
    usual = targets.Core()
    assert 0.5 <= measured.multiply_adds <= 4
    assert 2 <= measured.latency <= 8
    assert 0.5 <= measured.loads <= 4
    assert 0.2 <= measured.load_cycles <= 2
    assert 8 * 1024 <= measured.l1_bytes < measured.l2_bytes
    assert measured.l2_rate >= measured.l3_rate > 1
    assert asdict(measured).keys() == asdict(usual).keys()


def test_the_measured_core_chooses_as_the_fitted_row(measured):
    """On a processor that kernels were fitted to, measuring it finds the same kernels and the same layouts."""
    machine = targets.find_machine()
    if not machine.known:
        pytest.skip("no row fits this processor")
    rng, plans = np.random.default_rng(0), []
    nodes, shapes = everything(rng, 64, 28, 3, 2, ("clip", 0.0, None), separable=True)
    weight = block_weight(rng, 256, 69, (1, 1), 16, 0.5, False)
    nodes[-1] = graph.Conv("wide", ["q"], "y", weight=weight, bias=np.zeros(256, np.float32))
    network = graph.Graph(nodes, {"x": (2, 3, 28, 28), **shapes, "y": (2, 256, 14, 14)}, "x", "y")
    passes.fuse_depthwise(network)
    for facts in (machine.core, measured):
        plan = layout.make_plan(cost.CostModel(network, replace(machine, core=facts)))
        plans.append((plan.nchwc, {name: replace(s, cycles=0.0) for name, s in plan.schedules.items()}))
    assert plans[0] == plans[1]
