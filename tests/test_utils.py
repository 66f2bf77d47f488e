"""Options, schedules, files, counts and reports."""

import dataclasses
import json
import os
import time
from pathlib import Path

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
from utils.options import MARK, Options, parse, parser, table
from utils.ranks import Ranks
from utils.run import Meter, Run, fit, learning_rate

# Freezing the command line: a flag is added on purpose.
FLAGS = """
--arch --data_set --data_path --image_size --bad_pictures --job_dir --config --seed --gpus --workers
--conv_type --method --N --pr_target --rearrange --no-rearrange --rearrange_by --full --no-full --blocks --balanced
--no-balanced --budget --max_rate --rates --schedule --schedule_end --schedule_every
--sr --threshold --pr_unit --freeze_weights
--flops_target --tied_groups --no-tied_groups --lasso_strength --before_mask_iters --mask_interval --begin_granularity
--num_at_least --compactor_momentum --decay_compactors --no-decay_compactors --bias_lr_factor --conversion_threshold
--round_to --mask_end
--pretrained_model --pretrain_model --evaluate --pruned_model --resume --export_onnx --no-export_onnx
--num_epochs --train_batch_size --eval_batch_size --optimizer --lr --lr_policy --lr_type --warmup_length --momentum
--nesterov --no-nesterov --weight_decay --amp --no-amp --label_smoothing --label-smoothing -h --help
--lr_gamma --lr_decay_freq --lr_adjust --lr_decay_step --debug --no-debug --accumulate --compile --no-compile --ema
--distill --temperature --use_dali --no-use_dali --check_data --no-check_data
--layer_type --k --exp_mode --score_init --mask_lr --mask_lr_policy --mask_lr_schedule --lr2 --accelerate
--no-accelerate --shrink --no-shrink --fidelity --rounds --rewind --no-rewind
"""


def test_the_command_line_is_frozen():
    assert set(parser()._option_string_actions) == set(FLAGS.split())


def test_the_readme_lists_the_options():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    assert readme.split(MARK)[1].strip() == table().strip(), "python -m utils.options writes it"


def test_command_line_wins_over_yaml_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("# a comment\nN: 8\npr_target: 0.75\nrearrange: true\nlr: 1\ngpus: 0\n")
    options = parse(["--config", str(recipe), "--N", "4", "--no-rearrange"])
    assert (options.N, options.pr_target, options.rearrange, options.lr, options.gpus) == (4, 0.75, False, 1.0, [0])
    assert options.arch == Options().arch


def test_both_spellings_mean_the_same(tmp_path):
    path = str(tmp_path)
    assert parse(["--pretrain_model", path]).pretrained_model == parse(["--pretrained_model", path]).pretrained_model
    assert parse(["--lr_type", "step"]).lr_policy == "step"
    assert parse(["--label-smoothing", "0.1"]).label_smoothing == 0.1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--N", "four"], "--N: invalid int value: 'four'"),
        (["--optimizer", "lbfgs"], "invalid choice: 'lbfgs'"),
        (["--num_epochs", "-1"], "--num_epochs -1: must be 0 or more"),
        (["--train_batch_size", "0"], "--train_batch_size 0"),
        (["--evaluate", "nowhere.pt"], "--evaluate nowhere.pt: must be an existing path"),
        (["--num_epochs", "3", "--warmup_length", "3"], "--warmup_length 3"),
        (["--gpus", "1", "1"], "different GPUs"),
        (["--distill", "0.5"], "--distill 0.5: must be 0 without --pretrained_model"),
        (["--ema", "1.5"], "--ema 1.5: must be a decay"),
        (["--bn_type", "LearnedBatchNorm"], "--bn_type had no effect in the published code"),
        (["--test_only"], "--test_only had no effect .* use --evaluate"),
        (["--config", "nowhere.yml"], "--config nowhere.yml: .*No such file"),
        (["--arc", "resnet20"], "unrecognized arguments: --arc"),  # no guessing at flags
    ],
)
def test_wrong_options_are_one_line(argv: list[str], message: str):
    with pytest.raises(ValueError, match=message) as error:
        parse(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("blocksize: 4", "unknown key blocksize"),
        ("N: [4", "recipe.yml: while parsing"),
        ("- N", "not a mapping"),
        ("N: four", "N: 'four' is not a int"),
        ("N: 4.5", "N: 4.5 is not a int"),
        ("rearrange: 1", "rearrange: 1 is not a bool"),
        ("optimizer: lbfgs", "'lbfgs' is not one of sgd, adam"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_wrong_recipes_are_one_line(content: str, message: str, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        parse(["--config", str(recipe)])
    assert "\n" not in str(error.value)


def test_every_option_has_help_and_survives_json():
    assert all(field.metadata["help"] for field in dataclasses.fields(Options))
    assert json.loads(json.dumps(Options().to_json()))["job_dir"] == "experiments"


def test_published_learning_rates():
    def cos(epoch, step):
        return learning_rate(Options(), epoch, step, 5005)

    assert cos(0, 0) == pytest.approx(3.99e-7, rel=2e-3)
    assert cos(4, 5004) == pytest.approx(9.9992e-3, rel=1e-4)
    assert cos(5, 0) == pytest.approx(1.0e-2)
    assert cos(90, 17) == pytest.approx(5.2243e-3, rel=1e-4)
    assert cos(179, 0) == pytest.approx(8.06e-7, rel=1e-3)
    for policy, epoch, expected in (("step", 85, 1e-3), ("exp", 10, 0.96**10), ("fixed", 100, 1.0)):
        assert learning_rate(Options(lr=1.0, lr_policy=policy), epoch, 0, 10) == pytest.approx(expected)
    options = Options(lr=1.0, lr_policy="step", lr_decay_step=[50, 100], lr_gamma=0.5)
    assert [learning_rate(options, epoch, 0, 10) for epoch in (49, 50, 120)] == [1.0, 0.5, 0.25]


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
    (tmp_path / ".last.pt.x1y2").write_bytes(b"of a killed process")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["last.pt"]


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
    return {"latency_ms": times, "threads": 1, "batch": 1, "max_relative_error": 1e-6}


def test_report_tells_accuracy_costs_and_latency(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    report.write(tmp_path, report.screen())
    text = (tmp_path / "summary.md").read_text()
    assert "| top-1, after training | 97.50 % |" in text
    assert "| features.0.3 | 8x4x1x1 | 1x4 blocks | 50.0 % | 50.0 % | 100 of 200 | 20 of 40 | as it is |" in text
    assert "latency" not in text
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "deploy.json").write_text(json.dumps(deployed()))
    report.write(tmp_path, report.screen())
    text = (tmp_path / "summary.md").read_text()
    assert "| latency, TVM, block-sparse | 1.000 ms | 2.00 x (1 thread, batch 1) |" in text
    assert (tmp_path / "summary.png").read_bytes()[:4] == b"\x89PNG"


def test_job_dir_is_a_path():
    assert isinstance(parse(["--job_dir", "here"]).job_dir, Path)


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
