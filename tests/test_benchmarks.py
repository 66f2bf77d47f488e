"""benchmarks/: what is made of measurements, and that nothing measured is lost or measured twice. No timing here."""

import copy
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import models
from benchmarks import sparse_inference, sparse_points, sparse_report
from benchmarks.sparse_points import DENSE, KNOWN, Point
from deploy.peers import PEERS
from utils.count import count


def build(ms: float, **more) -> dict:
    size = {"mflop": 100.0, "weight_bytes": 2**20, "activation_bytes": 2**20}
    proven = {"error": 1e-6, "top1": 1.0, "compile_s": 3.0, "start_up": {"load_ms": 7.0, "peak_mib": 2.5}}
    return {"ms": {"median": ms, "p10": ms / 2}} | size | proven | more


def measured(points: dict[Point, float]) -> dict:
    """What a network's process gives back: peers take 4 and 3 ms in float32, 1.6 in bfloat16, 1.5 in int8."""
    times = {"onnxruntime_dense": 4.0, "openvino_dense": 3.0, "openvino_default": 1.6, "onnxruntime_int8": 1.5}
    facts = {name: {"dtype": "bfloat16"} if name in times else {"absent": "pip install it"} for name in PEERS}
    peers = {name: {"median": ms, "p10": ms - 0.1} for name, ms in times.items()}
    builds = {str(point): build(ms) for point, ms in points.items()}
    return {"peers": peers, "peer_facts": facts, "builds": builds, "peak_gflops": 200.0}


def entry(network: str, points: dict[Point, float], threads: int = 1, size: int = 224) -> dict:
    where = {"cpu": "a processor", "cores": 2, "gpus": [], "python": "3", "versions": {"tvm": "1"}, "commit": "c"}
    where["tunables"] = None
    how = {"machine": where, "command": "python it", "date": "today", "runs": 10}
    return {"network": network, "image_size": size, "threads": threads} | measured(points) | how


def test_ratios_are_against_the_faster_peer_and_stand_beside_their_targets():
    one = entry("mobilenet_v1", {DENSE: 3.0, Point(16, 50): 2.0})
    head, row = sparse_report.ratio_table([one])
    cells = dict(zip(head, row, strict=True))
    assert cells["dense"] == "1.00 / 0.97"
    assert cells["N=16, 50 %"] == "1.50 / 1.7"
    assert cells["N=32, 90 %"] == ""  # not measured
    small = entry("mobilenet_v1", {Point(16, 50): 2.0}, size=96)
    assert "1.50" in sparse_report.ratio_table([small])[1]  # targets are for 224


def test_the_compute_bound_is_the_arithmetic_at_peak():
    one = entry("mobilenet_v1", {Point(16, 50): 2.0})
    # 100 MFLOP at 200 GFLOP/s take 0.5 ms; the faster peer takes 3.
    assert sparse_report.speed_table([one])[-1][-5:] == ["1.000", "1.50", "1.50", "1.7", "6.0"]


def test_memory_is_held_against_weights_and_activations():
    head, row = sparse_report.cost_table([entry("resnet50", {DENSE: 1.0})])
    cells = dict(zip(head, row, strict=True))
    assert (cells["memory"], cells["at most"], cells["loaded in"]) == ("2.5 MiB", "2.6 MiB", "7 ms")
    assert (cells["compiled in"], cells["target"]) == ("3.0 s", "60 s")


def test_accuracy_is_read_from_the_other_report(tmp_path):
    lines = ["| dense | 0.0 % | 81 | 87.97 | +0.00 |", "| 1x4 at 50 % | 49.8 % | 14 | 84.62 | -3.35 |"]
    lines += ["| weight at 50 % | 49.8 % | 77 | 87.69 | -0.28 |", "| 1x4 at 50 % | 0.422 ms | 1.55 x | 1.50 x |"]
    (tmp_path / "report.md").write_text("\n".join(lines))
    assert sparse_report.known_accuracy(tmp_path / "report.md") == {DENSE: 87.97, Point(4, 50): 84.62}
    assert sparse_report.known_accuracy(tmp_path / "none.md") == {}


def test_the_report_says_how_every_entry_was_measured(tmp_path):
    points = {DENSE: 3.0, Point(4, 50): 2.0, Point(4, 75): 1.0}
    other = copy.deepcopy(entry(KNOWN, points, size=32))
    other["machine"]["commit"] = "d"
    sparse_report.write([entry("resnet50", points), entry("resnet50", points, 2), other], tmp_path)
    text = (tmp_path / "sparse_inference.md").read_text()
    assert "Accuracy against latency" in text  # benchmarks/results/cifar10_1xn.md has it
    assert text.count("`python it`") == 2  # two commits
    assert (tmp_path / "sparse_inference.png").stat().st_size > 1000
    assert (tmp_path / "sparse_accuracy.png").stat().st_size > 1000


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The benchmark with measuring replaced by a list of what was asked."""
    asked = []

    def in_a_process(function, *arguments):
        asked.append(function.__name__)
        if function is sparse_inference.measure_network:
            if "vgg16_bn" in str(arguments):
                raise ValueError("killed")
            return measured({Point.parse(point): 1.0 for point in arguments[0]})
        return None

    monkeypatch.setattr(sparse_inference, "in_a_process", in_a_process)
    monkeypatch.setattr(sparse_inference, "write", lambda *_: None)

    def run(*argv: str) -> list[str]:
        asked.clear()
        folders = ["--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", ["sparse_inference.py", *argv, *folders])
        sparse_inference.main()
        return [name for name in asked if name == "measure_network"]

    run.results = tmp_path / "sparse_inference.json"
    return run


def test_what_is_measured_is_not_measured_again(calls):
    some = ["--networks", "resnet18", "--points", "4:50", "16:50", "--runs", "10"]
    assert len(calls(*some, "--threads", "1")) == 1
    assert len(calls(*some, "--threads", "1", "2")) == 1  # two threads only
    assert len(calls(*some, "--image_size", "96")) == 2
    assert len(json.loads(calls.results.read_text())) == 4
    assert len(calls(*some)) == 0
    assert len(calls(*some, "--again")) == 2
    assert len(calls(*some[:-1], "20")) == 2  # more runs than before
    assert len(calls("--networks", "resnet18", "--points", "32:90", "--runs", "10")) == 2
    types = ["--networks", "resnet18", "--points", "32:90", "--runs", "10", "--dtypes", "float32", "int8"]
    assert len(calls(*types)) == 2
    assert len(calls(*types)) == 0
    there = {"0:0", "32:90", "0:0:int8", "32:90:int8"}
    assert there in [entry["builds"].keys() for entry in json.loads(calls.results.read_text()).values()]


def test_an_interrupted_run_keeps_what_it_measured(calls):
    networks = ["mobilenet_v1", "resnet18", "vgg16_bn"]
    with pytest.raises(ValueError, match="killed"):
        calls("--networks", *networks, "--threads", "1", "--points", "4:50")
    assert [e["network"] for e in json.loads(calls.results.read_text()).values()] == networks[:2]


def costs() -> list:
    """Of the layers of the network below."""
    return list(count(models.create_model("resnet20", 10), torch.zeros(1, 3, 16, 16)).values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("resnet20") / "model.onnx"
    sparse_inference.export("resnet20", 16, Point(4, 50), path)
    return path


def test_arithmetic_and_activations_are_counted_from_the_file(exported):
    size = sparse_inference.work(exported)
    first, *_, last = costs()
    halved = sum(cost.macs for cost in costs()) + first.macs + last.macs  # these two are not pruned
    assert size["mflop"] * 1e6 == pytest.approx(halved, rel=0.01)  # half the multiply-adds, two operations each
    assert size["activation_bytes"] == 4 * 2 * 16 * 16 * 16


def test_kernels_are_listed_with_their_layers(exported):
    pytest.importorskip("tvm")
    lines = sparse_inference.layers(exported, 1, 3).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "_conv_" in line]
    shapes = Counter("x".join(map(str, (*cost.shape, 1, 1)[:4])) for cost in costs())
    found = Counter()
    for _, calls, us, _, shape, *_ in rows:
        found[shape] += int(calls)
        assert float(us) > 0
    assert found == shapes
    assert len(rows) < len(costs())  # those that are alike share a row


def test_every_type_is_measured_by_the_fastest_peer_of_the_same_type():
    """Against float32, int8 of any kind looks fast."""
    narrow = {Point(16, 50, "bfloat16"): 1.0, Point(16, 50, "int8"): 1.0}
    one = entry("mobilenet_v1", {DENSE: 3.0} | narrow)
    head, *rows = sparse_report.speed_table([one])
    cells = {(row[2], row[3]): dict(zip(head, row, strict=True)) for row in rows}
    mine = {dtype: cells["ours, N=16, 50 %", dtype] for dtype in ("bfloat16", "int8")}
    assert [row["ratio to float32"] for row in mine.values()] == ["3.00", "3.00"]
    assert [(row["ratio"], row["target"]) for row in mine.values()] == [("1.60", "1.6"), ("1.50", "1.6")]
    # 100 MFLOP at 200 GFLOP/s take 0.5 ms in float32, half of that in bfloat16, a quarter in int8.
    assert [row["compute bound"] for row in mine.values()] == ["6.4", "12.0"]
    assert cells["OpenVINO as installed, dense", "bfloat16"]["ratio"] == "1.00"
    head, *rows = sparse_report.ratio_table([one])
    found = {row[2]: dict(zip(head, row, strict=True))["N=16, 50 %"] for row in rows}
    assert found == {"float32": "", "bfloat16": "1.60 / 1.6", "int8": "1.50 / 1.6"}
    assert sparse_points.missed(one) == [Point(16, 50, "int8")]
    one["peer_facts"]["openvino_default"]["dtype"] = "float32"  # a processor without bfloat16
    assert sparse_points.fastest(one, "bfloat16") is None
    assert sparse_points.fastest(one) == 3.0
    assert sparse_report.speed_table([one])[-2][-3] == ""
    one["absent"] = {"bfloat16": "it has no dot product"}
    assert "ours in bfloat16 (it has no dot product)" in sparse_report.absent([one])


def test_a_point_is_written_with_its_type():
    for point, text in ((Point(4, 50), "4:50"), (Point(4, 50, "int8"), "4:50:int8")):
        assert str(point) == text
        assert Point.parse(text) == point


def test_peers_of_all_types_stand_in_the_tables_beside_ratios_to_float32(tmp_path):
    one = entry("mobilenet_v1", {DENSE: 3.0, Point(4, 50): 2.0})
    one["builds"]["4:50"]["peers"] = {"mnn": {"median": 6.0, "p10": 5.9}}
    rows = {row[2]: row[6] for row in sparse_report.speed_table([one])}
    assert rows["OpenVINO as installed, dense"] == "1.88"
    assert rows["ONNX Runtime int8, dense"] == "2.00"
    assert rows["ours, N=4, 50 %"] == "1.50"  # of 3 ms, not of 1.5
    assert rows["MNN, N=4, 50 %"] == "0.50"
    assert "Not timed everywhere: MNN (pip install it); OpenVINO int8 (pip install it)." in sparse_report.absent([one])
    former = {key: value for key, value in one.items() if key != "peer_facts"}
    assert sparse_inference.covers(one, [DENSE], 10)
    assert not sparse_inference.covers(former, [DENSE], 10)  # it has the first two peers only


def test_what_misses_its_target_is_named():
    one = entry("mobilenet_v1", {DENSE: 3.0, Point(4, 50): 2.0, Point(16, 50): 1.7, Point(32, 50): 1.6})
    assert sparse_points.missed(one) == [Point(32, 50)]  # 1.5 of 1.5, 1.76 of 1.7, 1.88 of 1.9
    assert sparse_points.missed(entry("vgg16_bn", {DENSE: 9.0, Point(4, 50): 9.0})) == [DENSE]  # asked of every network
