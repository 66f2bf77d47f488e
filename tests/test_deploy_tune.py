"""deploy/tuning/tune.py: what is measured decides, is measured once, and is kept; the slower library is never saved."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tvm")
from onnx import helper
from test_deploy import OTHER, agrees, block_weight, onnx_file, small_file

import deploy
import model_tune
from deploy import report, targets
from deploy.codegen import program
from deploy.onnx import graph, passes, reader
from deploy.plan import cost, layout
from deploy.tuning import clock, measure, tune


def network_file(path: Path) -> Path:
    """All that is measured, wide enough for either layout: convolutions, depthwise in front, a residual, pooling."""
    rng = np.random.default_rng(0)
    weights = {
        "stem": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "deep": rng.standard_normal((16, 1, 3, 3)).astype(np.float32),
        "wide": block_weight(rng, 32, 16, (1, 1), 16, 0.5, False),
        "narrow": block_weight(rng, 16, 32, (3, 3), 16, 0.5, True),
        "classes": rng.standard_normal((5, 16)).astype(np.float32),
    }
    n = helper.make_node
    nodes = [
        n("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1], name="stem"), n("Relu", ["a"], ["b"]),
        n("Conv", ["b", "deep"], ["c"], group=16, pads=[1, 1, 1, 1]), n("Conv", ["c", "wide"], ["d"], name="wide"),
        n("Relu", ["d"], ["e"]), n("Conv", ["e", "narrow"], ["f"], pads=[1, 1, 1, 1], name="narrow"),
        n("Add", ["f", "b"], ["g"]), n("MaxPool", ["g"], ["h"], kernel_shape=[2, 2], strides=[2, 2]),
        n("GlobalAveragePool", ["h"], ["i"]), n("Flatten", ["i"], ["j"]),
        n("Gemm", ["j", "classes"], ["y"], transB=1, name="classes"),
    ]  # fmt: skip
    return onnx_file(path, nodes, weights, (2, 3, 8, 8))


def network_of(path: Path) -> graph.Graph:
    return passes.simplify(reader.read_onnx(path))


def unmeasured(*_):
    raise AssertionError("measured again")


def test_a_tuned_library_is_equal_and_nothing_is_measured_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "CANDIDATES", 1)
    path, file = network_file(tmp_path / "m.onnx"), tmp_path / "tuned.json"
    first = agrees(path, tune=file)
    kept = json.loads(file.read_text())
    assert kept["threads"] == 2
    assert len(kept["times_ms"]) >= 10
    assert all(0 < ms < 1000 for ms in kept["times_ms"].values())
    monkeypatch.setattr(tune, "milliseconds", unmeasured)
    assert agrees(path, tune=file).info["layers"] == first.info["layers"]
    assert not any(row["sparse"] for row in agrees(path, tune=file, dense=True).info["layers"])  # its kernels are known


def test_what_stands_around_a_layer_is_not_counted(tmp_path, monkeypatch):
    network, machine = network_of(network_file(tmp_path / "m.onnx")), targets.find_machine()
    node = next(node for node in network.nodes if node.name == "narrow")
    asked = []

    def make_program(*arguments):
        made = real(*arguments)
        names = ["slice_pad_0", "reorder_1", "reorder_2", "nchwc_conv_3", "reorder_4"]
        assert [name for _, name, _ in made.calls()] == names
        return made

    def seconds(module, calls, *_):
        asked.append([name for name, _ in calls])
        assert [v.name_hint for v in module.functions] == ["nchwc_conv_3"]
        return [8e-3]

    best, real = cost.CostModel(network, machine).best(node, True), program.make_program
    monkeypatch.setattr(tune, "make_program", make_program)
    monkeypatch.setattr(clock, "seconds", seconds)
    peak = 3 * 2 * machine.lanes * machine.core.multiply_adds  # at 3 GHz
    monkeypatch.setattr(clock, "peak_gflops", lambda *_: peak)
    times = tune.Times(tmp_path / "tuned.json", machine)
    assert times.cycles(network, node, best.schedule, best.pattern) == pytest.approx(8e6 * 3)
    assert asked == [["nchwc_conv_3"]]


def test_an_interrupted_tuning_goes_on(tmp_path, monkeypatch):
    path, machine, file = network_file(tmp_path / "m.onnx"), targets.find_machine(), tmp_path / "tuned.json"
    counts, limits = [0, 0, 0], [5, 10**9, 0]

    def arrange(attempt: int):
        def milliseconds(*_):
            if counts[attempt] == limits[attempt]:
                raise KeyboardInterrupt
            counts[attempt] += 1
            return float(sum(counts))

        monkeypatch.setattr(tune, "milliseconds", milliseconds)
        return layout.make_plan(tune.MeasuredCostModel(tune.Times(file, machine), network_of(path), machine))

    with pytest.raises(KeyboardInterrupt):
        arrange(0)
    begun = json.loads(file.read_text())["times_ms"]
    assert list(begun.values()) == [1, 2, 3, 4, 5]
    decided = arrange(1)
    assert json.loads(file.read_text())["times_ms"].items() >= begun.items()
    assert len(json.loads(file.read_text())["times_ms"]) == sum(counts) > 20
    assert arrange(2).schedules == decided.schedules


def test_the_fastest_candidate_is_taken_whichever_it_is(tmp_path, monkeypatch):
    """Sparse and dense ones, in NCHW and in NCHWc: the rule has no say once it has named them."""
    rng, machine = np.random.default_rng(0), targets.find_machine()
    weight = block_weight(rng, 32, 48, (1, 1), 32, 0.5, False)
    node = graph.Conv("conv", ["x"], "y", weight=weight, bias=np.zeros(32, np.float32))
    network = graph.Graph([node], {"x": (1, 48, 8, 8), "y": (1, 32, 8, 8)}, "x", "y")
    asked, fastest = [], None

    def milliseconds(graph, machine, plan, place):
        asked.append(plan.schedules["y"])
        return 0.001 if asked[-1] == fastest else 1.0

    def arrange(file: str) -> layout.Plan:
        return layout.make_plan(tune.MeasuredCostModel(tune.Times(tmp_path / file, machine), network, machine))

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    arrange("all.json")
    every = list(asked)
    kinds = {(schedule.family.nchwc, schedule.sparse) for schedule in every}
    assert kinds == {(a, b) for a in (False, True) for b in (False, True)}
    for number, fastest in enumerate(every):
        assert arrange(f"{number}.json").schedules["y"] == fastest


def test_wrong_files_are_refused_in_one_line(tmp_path, capsys):
    network, file = str(small_file(tmp_path / "m.onnx")), tmp_path / "tuned.json"
    target = str(targets.find_machine().target)
    good = {
        "version": tune.VERSION,
        "target": target,
        "threads": 1,
        "cpu": "another one",
        "gigahertz": 3.0,
        "times_ms": {},
    }
    cases = [
        ("{", [], "is no file of measured kernels"),
        ("[1]", [], "is no file of measured kernels"),
        ('{"layers": []}', [], "is no file of measured kernels"),
        (json.dumps(good | {"times_ms": {"a": "b"}}), [], "is no file of measured kernels"),
        (json.dumps(good | {"version": 1}), [], "was written by another version of --tune"),
        (json.dumps(good | {"threads": 7}), [], "was measured with threads 7, not 1"),
        (json.dumps(good | {"target": "z80"}), [], "was measured with target z80, not"),
        (json.dumps(good), [], "was measured on another processor (another one)"),
        (None, ["--target", OTHER], f"this computer cannot time {OTHER}'s"),
    ]
    for content, words, message in cases:
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        assert model_tune.main(["--onnx_path", network, "--threads", "1", "--tune", str(file), *words]) == 2, message
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1, err
        assert (file.read_text() if file.exists() else None) == content


def test_a_shipped_file_serves_where_nothing_can_be_measured(tmp_path, monkeypatch):
    path, file = small_file(tmp_path / "m.onnx"), tmp_path / "tuned.json"
    with monkeypatch.context() as there:
        there.setattr(clock, "lacking", lambda requires: [])
        there.setattr(clock, "peak_gflops", lambda *_: 16.0)
        there.setattr(tune, "milliseconds", lambda *_: 1.0)
        deploy.compile_onnx(path, OTHER, threads=1, tune=file)
    made = json.loads(file.read_text()) | {"cpu": "another one"}
    file.write_text(json.dumps(made))
    assert deploy.compile_onnx(path, OTHER, threads=1, tune=file).info["tuned"] == str(file)
    assert json.loads(file.read_text()) == made


@pytest.mark.parametrize("milliseconds", [1.0, 1.02, 1.2])
def test_a_library_slower_than_its_dense_twin_is_not_saved(tmp_path, monkeypatch, capsys, milliseconds):
    """Measured slower by more than the noise: the dense one takes its place, and the report says so."""

    def race(racers, *_):
        return {
            name: dict.fromkeys(("median", "p10"), milliseconds if "tvm_sparse" in name else 1.0) for name in racers
        }

    monkeypatch.setattr(measure, "race", race)
    path = small_file(tmp_path / "m.onnx")
    assert model_tune.main(["--onnx_path", str(path), "--threads", "1"]) == 0
    info = json.loads((tmp_path / "deploy" / "deploy.json").read_text())
    slower = milliseconds > report.NOISE
    assert info["saved"] == ("tvm_dense" if slower else "tvm_sparse")
    assert any(layer["sparse"] for layer in info["layers"]) != slower
    for text in (capsys.readouterr().out, (tmp_path / "deploy" / "deploy.md").read_text()):
        assert ("THE DENSE ONE IS SAVED" in " ".join(text.split())) == slower
    images = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    twin = deploy.compile_onnx(path, threads=1, dense=slower)
    np.testing.assert_array_equal(deploy.load(tmp_path / "deploy").run(images), twin.run(images))
