"""Options, schedules, files, counts and reports."""

import json
import os
import time

import pytest
import torch
from torch import nn

import models
import pruning
from data.loader import ResidentLoader
from utils import report
from utils.callbacks import Callback, Record
from utils.count import count, totals
from utils.files import atomic, save_checkpoint, sweep
from utils.loss import Loss
from utils.options import Options
from utils.ranks import Ranks
from utils.run import Meter, Run, fit


def test_published_learning_rates():
    def cos(epoch, step):
        return Options().schedule()(epoch, step, 5005)

    assert cos(0, 0) == pytest.approx(3.99e-7, rel=2e-3)
    assert cos(4, 5004) == pytest.approx(9.9992e-3, rel=1e-4)
    assert cos(5, 0) == pytest.approx(1.0e-2)
    assert cos(90, 17) == pytest.approx(5.2243e-3, rel=1e-4)
    assert cos(179, 0) == pytest.approx(8.06e-7, rel=1e-3)
    for policy, epoch, expected in (("step", 85, 1e-3), ("exp", 10, 0.96**10), ("fixed", 100, 1.0)):
        assert Options(lr=1.0, lr_policy=policy).schedule()(epoch, 0, 10) == pytest.approx(expected)
    rate = Options(lr=1.0, lr_policy="step", lr_decay_step=[50, 100], lr_gamma=0.5).schedule()
    assert [rate(epoch, 0, 10) for epoch in (49, 50, 120)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("arch", "size", "macs", "parameters"),
    [
        ("mobilenet_v1", 224, 568_740_352, 4_237_928),
        ("resnet50", 224, 4_089_184_256, 25_557_032),
        ("resnet56", 32, 125_485_696, 853_018),
    ],
)
def test_published_counts(arch: str, size: int, macs: int, parameters: int):
    network = models.create_model(arch, 10 if size == 32 else 1000)
    sums = totals(network, count(network, torch.zeros(1, 3, size, size)))
    assert (sums["macs"], sums["parameters"]) == (macs, parameters)


def test_zeros_are_not_kept():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 25, 3))
    with torch.no_grad():
        network[0].weight[:2] = 0
    costs = count(network, torch.zeros(1, 2, 5, 5))
    assert (costs["0"].macs, costs["0"].macs_kept) == (72 * 25, 36 * 25)
    assert (costs["2"].macs, costs["2"].macs_kept) == (300, 300)
    assert totals(network, costs)["parameters_kept"] == 36 + 4 + 300 + 3


def test_meter_counts_by_hand():
    meter = Meter(torch.device("cpu"))
    logits = torch.eye(10)[:4] * 5
    meter.add(torch.tensor(2.0), logits, torch.tensor([0, 1, 9, 9]))
    meter.add(torch.tensor(1.0), logits[:1], torch.tensor([0]))
    assert meter.result(Ranks()) == {"loss": pytest.approx(1.8), "top1": 60.0, "top5": 60.0}


def test_distillation_is_nothing_between_equals_and_pulls_otherwise():
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    plain = Loss()(logits, labels, logits)
    assert torch.isclose(Loss(0.0, nn.Identity(), 0.5)(logits, labels, logits), 0.5 * plain)
    far = Loss(0.0, nn.Identity(), 0.5)(logits, labels, -logits)
    assert far > 0.5 * plain


def test_a_broken_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"half of a ")
        raise RuntimeError
    assert torch.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]
    (tmp_path / ".last.pt.x1y2.part").write_bytes(b"of a killed process")
    (tmp_path / ".gitignore").write_text("the user's own")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".gitignore", "last.pt"]


def test_records_of_an_interrupted_epoch_are_dropped(tmp_path):
    lines = [{"epoch": 0, "split": "dense"}, {"epoch": 1, "split": "val"}, {"epoch": 2, "split": "val"}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 3, "spl'
    (tmp_path / "metrics.jsonl").write_text(text)
    Record(tmp_path, 1, {"dense": {"top1": 1.0}})
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == lines[:2]


def summary() -> dict:
    figures = {"top1": 97.5, "top5": 100.0, "loss": 0.1}
    sums = {"macs": 200, "macs_kept": 100, "parameters": 50, "parameters_kept": 30, "sparsity": 0.5}
    layer = {"name": "features.0.3", "shape": [8, 4, 1, 1], "pattern": "1x4 blocks", "rate": 0.5, "sparsity": 0.5}
    layer |= {"macs": 200, "macs_kept": 100, "parameters": 40, "parameters_kept": 20, "note": "as it is"}
    facts = {"arch": "mobilenet_v1", "data_set": "digits", "method": "block_l1", "accuracy": {"tuned": figures}}
    return facts | {"totals": sums, "layers": [layer]}


def deployed() -> dict:
    times = {name: {"median": ms, "p10": ms} for name, ms in zip(report.RUNTIMES, (2.0, 2.5, 1.0), strict=True)}
    return {"sha256": "1234", "latency_ms": times, "threads": 1, "batch": 1, "max_relative_error": 1e-6}


def test_report_tells_accuracy_costs_and_latency(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    report.write(tmp_path, report.screen())
    text = (tmp_path / "summary.md").read_text()
    assert "| top-1, after training | 97.50 % |" in text
    assert "| features.0.3 | 8x4x1x1 | 1x4 blocks | 50.0 % | 50.0 % | 100 of 200 | 20 of 40 | as it is |" in text
    assert "latency" not in text
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "deploy.json").write_text(json.dumps(deployed()))
    for digest in (None, "5678"):
        (tmp_path / "summary.json").write_text(json.dumps(summary() | {"onnx_sha256": digest}))
        report.write(tmp_path, report.screen())
        assert "latency" not in (tmp_path / "summary.md").read_text(), "the library was made from another file"
    missed = {"onnx_sha256": "1234", "not_reached": ["--pr_target 0.5: 0 % of the weights are gone."]}
    (tmp_path / "summary.json").write_text(json.dumps(summary() | missed))
    report.write(tmp_path, report.screen())
    text = (tmp_path / "summary.md").read_text()
    assert "| latency, TVM, block-sparse | 1.000 ms | 2.00 x (1 thread, batch 1) |" in text
    assert "**Not reached:** --pr_target 0.5: 0 % of the weights are gone." in text
    narrow = json.dumps(deployed() | {"dtype": "int8", "quantised": {"made": None}})
    (tmp_path / "deploy" / "deploy.json").write_text(narrow)
    report.write(tmp_path, report.screen())
    text = (tmp_path / "summary.md").read_text()
    assert "| latency, TVM in int8, block-sparse | 1.000 ms |" in text  # not to be taken for float32
    assert "largest relative difference of outputs to the quantised network's" in text
    assert (tmp_path / "summary.png").read_bytes()[:4] == b"\x89PNG"


def test_the_speed_of_training_leaves_evaluation_out(monkeypatch):
    """A callback that takes an hour shows neither in its own epoch nor in the next one."""
    late = [0.0]
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    class Slow(Callback):
        def after_epoch(self, run: Run, results: dict) -> None:
            late[0] += 3600
            speeds.append(results["train"]["images_per_second"])

    speeds = []
    images, labels = torch.randint(256, (8, 4, 4, 3), dtype=torch.uint8), torch.arange(8) % 2
    loader = ResidentLoader(images, labels, ["a", "b"], 4, True, 0, torch.device("cpu"))
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    fit(Run(network, pruning.create_method("dense"), loader, Loss(), 2, lambda *_: 0.1, torch.optim.SGD), [Slow()])
    assert len(speeds) == 2
    assert min(speeds) > 8 / 60
