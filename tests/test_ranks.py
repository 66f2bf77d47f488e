"""Two processes on the CPU (gloo): they train as one would, and count every picture once."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import pruning
from jobs.folder import resumable
from utils import report
from utils.average import statistics
from utils.files import save_checkpoint
from utils.loss import Loss
from utils.options import Options
from utils.ranks import Ranks, restarted
from utils.run import Run, evaluate, fit

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_on_digits(ranks: Ranks, method: pruning.Method, layers: list[nn.Module], **settings) -> tuple[Run, data.Loader]:
    """A run of 12 batches an epoch, and the pictures to evaluate by."""
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    train, val = data.create_loaders(
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
    for loader in (train, val):
        loader.rank, loader.world = ranks.rank, ranks.world
    train.limit = 12
    method.attach(network)

    def make(parameters):
        return torch.optim.SGD(parameters, 0.1, momentum=0.9)

    return Run(network, method, train, Loss(), rate=lambda *_: 0.1, make_optimizer=make, ranks=ranks, **settings), val


def train(ranks: Ranks) -> tuple[dict, dict]:
    """Two pruned epochs of a small network without batch-norm (whose statistics would be of half a batch)."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    run, val = run_on_digits(ranks, pruning.create_method("block_l1", N=4, pr_target=0.5), layers, epochs=2)
    fit(run, [])
    return run.network.state_dict(), evaluate(run.network, val, ranks)


def accumulate(ranks: Ranks) -> dict:
    """An epoch of three BiP steps on four batches each: two for the weights, two for the scores."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()]
    run, val = run_on_digits(ranks, pruning.create_method("bip"), layers, epochs=1, accumulate=2, ema=0.5)
    exchanges = []

    def counted(group, bucket):
        exchanges.append(run.iteration)
        return allreduce_hook(group, bucket)

    run.model.register_comm_hook(None, counted)
    fit(run, [])
    live = [tensor.clone() for tensor in statistics(run.network)]
    kept = run.kept_network()
    figures = evaluate(kept, val, ranks)
    return {"exchanges": exchanges, "live": live, "kept": kept.state_dict(), "figures": figures}


def assert_close(ours: tuple[dict, dict], theirs: tuple[dict, dict]) -> None:
    for name in theirs[0]:
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=1e-4, atol=1e-5)
    assert ours[1]["top1"] == pytest.approx(theirs[1]["top1"], abs=0.3)
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[list, list]:
    """What `train` and `accumulate` return in each of two processes."""
    tmp_path = tmp_path_factory.mktemp("ranks")
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import torch\nfrom test_ranks import accumulate, train\nfrom utils.ranks import join\n"
        "with join() as here:\n"
        "    result = train(here)\n"
        "    here.check_same(list(result[0].values()), 'weights')\n"
        f"    torch.save((result, accumulate(here)), {str(tmp_path)!r} + f'/{{here.rank}}.pt')\n"
    )
    subprocess.run([*TORCHRUN, str(script)], check=True, cwd=ROOT, timeout=120, env=environment())
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    return [trained for trained, _ in results], [accumulated for _, accumulated in results]


def test_two_processes_with_half_the_batch_train_as_one(results):
    alone = train(Ranks())
    for trained in results[0]:
        assert_close(trained, alone)


def test_gradients_are_exchanged_once_an_update(results):
    """And not once a batch, of which two are accumulated."""
    for accumulated in results[1]:
        assert accumulated["exchanges"] == [1, 1, 2, 2, 3, 3]


def test_all_processes_evaluate_the_same_network(results):
    """Their batch norms have seen different pictures, and no batch carries the buffers along."""
    first, second = results[1]
    assert not any(map(torch.equal, first["live"], second["live"]))
    assert all(torch.equal(tensor, second["kept"][name]) for name, tensor in first["kept"].items())
    assert first["figures"] == second["figures"]


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


def test_processes_started_anew_go_on_from_the_last_checkpoint(tmp_path, monkeypatch):
    """Whatever they had begun with, nothing or a file of the user; those that start for the first time do not."""
    last = tmp_path / "checkpoint" / "last.pt"
    options = Options(job_dir=tmp_path, resume=str(tmp_path / "mine.pt"))
    for path, epoch in ((last, 7), (tmp_path / "mine.pt", 2)):
        state = {"epoch": epoch, "loader": {"batch": 0}, "options": options.to_json()}
        save_checkpoint(path, state)
    screen = report.screen(quiet=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restarted()
    assert resumable(options, screen)["epoch"] == 2
    assert resumable(dataclasses.replace(options, resume=None), screen) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for resume in (options.resume, None, "last"):
        assert resumable(dataclasses.replace(options, resume=resume), screen)["epoch"] == 7
    last.unlink()
    assert resumable(options, screen)["epoch"] == 2
