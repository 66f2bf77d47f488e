"""Two processes on the CPU (gloo): they train as one would, and count every picture once."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import pruning
from utils.loss import Loss
from utils.ranks import Ranks
from utils.run import Run, evaluate, fit

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def train(ranks: Ranks) -> tuple[dict, dict]:
    """Two pruned epochs of a small network without batch-norm (whose statistics would be of half a batch)."""
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    network = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    loaders = data.create_loaders(
        "digits",
        data_path=None,
        image_size=16,
        train_batch_size=32,
        eval_batch_size=25,
        seed=3,
        device=torch.device("cpu"),
        workers=0,
        skip_bad=False,
    )
    for loader in loaders:
        loader.rank, loader.world, loader.limit = ranks.rank, ranks.world, 12
    loaders[1].limit = None
    method = pruning.create_method("block_l1", N=4, pr_target=0.5)
    method.attach(network)
    run = Run(
        network,
        method,
        loaders[0],
        loss=Loss(),
        epochs=2,
        rate=lambda epoch, step, steps: 0.1,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
        ranks=ranks,
    )
    fit(run, [])
    return network.state_dict(), evaluate(network, loaders[1], ranks)


def assert_close(ours: tuple[dict, dict], theirs: tuple[dict, dict]) -> None:
    for name in theirs[0]:
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=1e-4, atol=1e-5)
    assert ours[1]["top1"] == pytest.approx(theirs[1]["top1"], abs=0.3)
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=1e-4)


def test_two_processes_with_half_the_batch_train_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import torch\nfrom test_ranks import train\nfrom utils.ranks import join\n"
        "with join() as here:\n"
        "    result = train(here)\n"
        "    here.check_same(list(result[0].values()), 'weights')\n"
        f"    torch.save(result, {str(tmp_path)!r} + f'/{{here.rank}}.pt')\n"
    )
    subprocess.run([*TORCHRUN, str(script)], check=True, cwd=ROOT, timeout=120, env=environment())
    alone = train(Ranks())
    for rank in (0, 1):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), alone)


class Position:
    """As much of a loader as a single step asks for."""

    device, epoch, batch = torch.device("cpu"), 0, 1

    def __len__(self) -> int:
        return 1


def test_two_accumulated_halves_are_one_step_of_the_whole_batch():
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
    start = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    trained = []
    for parts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        network = copy.deepcopy(start)
        loader = Position()
        run = Run(
            network,
            pruning.create_method("dense"),
            loader,
            loss=Loss(),
            epochs=1,
            rate=lambda epoch, step, steps: 0.1,
            make_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
            accumulate=len(parts),
        )
        run.step(*[(images[part], labels[part]) for part in parts])
        trained.append(network[1].weight.detach())
    torch.testing.assert_close(*trained)


def test_torchrun_evaluates_every_picture_once_and_writes_once(tmp_path):
    arguments = ["--arch", "resnet20", "--data_set", "digits", "--image_size", "16", "--train_batch_size", "64"]
    arguments += ["--eval_batch_size", "33", "--conv_type", "BlockL1Conv", "--N", "4"]
    subprocess.run(
        [*TORCHRUN, "imagenet.py", *arguments, "--num_epochs", "1", "--job_dir", str(tmp_path)],
        cwd=ROOT,
        check=True,
        timeout=180,
        env=environment(),
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train", "val"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    final = str(tmp_path / "checkpoint" / "final.pt")
    command = [sys.executable, "imagenet.py", *arguments, "--evaluate", final]
    alone = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"top-1 {summary['accuracy']['tuned']['top1']:.2f}" in alone.stdout


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}
