"""The average of the weights: what it is, that it leaves training alone, and that its checkpoints go on exactly."""

import copy
from pathlib import Path

import pytest
import torch
from small_runs import EAGER, PLAIN, run_of
from torch import nn

import pruning
from pruning import METHODS
from utils.average import Average
from utils.callbacks import Callback, Evaluate, Save
from utils.run import Run, evaluate, fit


def test_average_by_hand():
    network = nn.BatchNorm1d(1)
    average = Average(network, 0.75)
    with torch.no_grad():
        network.weight.fill_(12.0)
        network.running_mean.fill_(11.0)
        network.num_batches_tracked.fill_(7)
    average.update(1)
    kept = average.network()
    assert kept.weight.item() == pytest.approx(10.0)  # 2/11 * 1 + 9/11 * 12: the warm-up's decay
    assert kept.running_mean.item() == pytest.approx(9.0)
    assert kept.num_batches_tracked.item() == 7, "a counter is copied"
    average.update(1000)
    assert average.network().weight.item() == pytest.approx(10.5)  # 3/4 * 10 + 1/4 * 12
    assert (network.weight.item(), network.running_mean.item()) == (12.0, 11.0)


def test_the_average_of_a_short_run_has_left_the_initial_weights():
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    average = Average(network, 0.9999)
    nn.init.ones_(network.weight)
    for number in range(1, 31):
        average.update(number)
    assert average.network().weight.item() > 0.999


@pytest.mark.parametrize("name", METHODS)
def test_an_average_without_memory_is_none(name: str):
    """With decay 0 the average is the network after every update: so training, evaluation and finish are the same."""
    results = []
    for ema in (None, 0.0):
        run, val = run_of(name, ema, **EAGER.get(name, {}))
        told = []

        class Tell(Callback):
            def after_epoch(self, run: Run, results: dict, told=told) -> None:
                told.append(results["val"])

        fit(run, [Evaluate(val), Tell()])
        network = run.kept_network()
        kept = pruning.finish(run.method, network, next(iter(val))[0])
        results.append((network.state_dict(), kept, told))
    (ours, kept, told), (theirs, others_kept, others_told) = results
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert (kept, told) == (others_kept, others_told)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param(name, EAGER.get(name, {})) for name in METHODS),
        ("stripe", {"pr_unit": "macs"}),
    ],
)
def test_the_average_is_finished_and_the_network_in_training_is_not(name: str, options: dict):
    """Catches a method that settles or finishes the network it was attached to instead of the one that it is given."""
    run, val = run_of(name, 0.9, **options)
    fit(run, [Evaluate(val)])
    network = run.average.network()
    with torch.no_grad():
        for parameter in run.network.parameters():
            parameter.add_(1e-7)  # so that settling it would show: its zeros are zeros no more
    before = copy.deepcopy(run.network.state_dict())
    pruning.finish(run.method, network, next(iter(val))[0])
    assert {type(module) for module in network.modules()} <= PLAIN
    after = run.network.state_dict()
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize(
    ("name", "options"),
    [("hydra", {"fidelity": "reference"}), ("bip", {"fidelity": "reference"}), ("bip", {}), ("block_l1", {"N": 4})],
)
def test_evaluating_the_average_changes_nothing_in_training(name: str, options: dict):
    """Also where scores share the memory of weights, which a swap of values would write to twice."""
    run, val = run_of(name, 0.9, **options)
    fit(run, [])
    before = copy.deepcopy(run.state_dict())
    evaluate(run.kept_network(), val)
    after = run.state_dict()
    for part in ("live", "state_dict"):
        same = {key: torch.equal(before[part][key], after[part][key]) for key in before[part]}
        masks = {key for key in same if key.endswith(".mask")} if part == "state_dict" else set()
        assert {key for key, holds in same.items() if not holds} <= masks, "the average's masks follow its own scores"
    if name == "hydra":
        layers = pruning.layers.masked_layers(run.average.network()).values()
        assert all(torch.equal(layer.weight, layer.popup_scores) for layer in layers)


class Top1(Callback):
    """Claims that the first epoch is the best, so that training goes on after `best.pt`."""

    def after_epoch(self, run: Run, results: dict) -> None:
        self.first = getattr(self, "first", results["val"])
        results["val"] = results["val"] | {"top1": 100.0 - run.epoch}


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("name", ["block_l1", "bip"])
def test_best_holds_the_weights_to_keep_and_resumes_as_last_does(name: str, ema: float | None, tmp_path: Path):
    run, val = run_of(name, ema, **EAGER.get(name, {}))
    top1 = Top1()
    fit(run, [Evaluate(val), top1, Save(tmp_path, {})])
    best = torch.load(tmp_path / "best.pt")
    assert best["epoch"] == 1

    resumed, _ = run_of(name, ema, **EAGER.get(name, {}))
    kept = resumed.average.copy if ema else resumed.network
    kept.load_state_dict(best["state_dict"])
    assert evaluate(kept, val) == top1.first, "what stands in `state_dict` is what was evaluated"

    resumed, _ = run_of(name, ema, **EAGER.get(name, {}))
    resumed.load_state_dict(best)
    fit(resumed, [])
    ours, theirs = run.kept_network().state_dict(), resumed.kept_network().state_dict()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_a_checkpoint_with_an_average_fits_no_run_without_and_the_reverse():
    with_average, without = run_of("dense", 0.9)[0], run_of("dense")[0]
    for run, other in ((with_average, without), (without, with_average)):
        with pytest.raises(ValueError, match="--resume: the checkpoint was made with another --ema"):
            run.load_state_dict(other.state_dict())


def test_rewinding_starts_the_average_anew_and_a_resumed_run_knows_it():
    """Catches an average that still holds the weights of the round before, and one that is slow after a resume."""
    whole, _ = run_of("imp", 0.999, rounds=2, k=0.25)
    states = []

    class Watch(Callback):
        def after_step(self, run: Run) -> None:
            if run.iteration == 7:  # the first of the second round
                decay = (1 + 1) / (10 + 1)
                for name, weight in run.network.named_parameters():
                    start = run.network.rewind_to[name] * getattr(weight_owner(run.network, name), "mask", 1)
                    expected = decay * start + (1 - decay) * weight
                    torch.testing.assert_close(run.average.network().get_parameter(name), expected)
            if run.iteration == 9:
                states.append(copy.deepcopy(run.state_dict()))

    fit(whole, [Watch()])
    resumed, _ = run_of("imp", 0.999, rounds=2, k=0.25)
    resumed.load_state_dict(states[0])
    fit(resumed, [])
    theirs = resumed.kept_network().state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.kept_network().state_dict().items())


def weight_owner(network: nn.Module, name: str) -> nn.Module | None:
    """The layer of a weight called `name`, or None for other parameters."""
    layer, _, kind = name.rpartition(".")
    return network.get_submodule(layer) if kind == "weight" else None
