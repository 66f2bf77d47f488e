"""The contract of all methods: a method is tested here by being listed in `pruning.METHODS`."""

import copy
import dataclasses
import math

import pytest
import torch
from small_runs import EAGER, PLAIN, run_of, small_network

import models
import pruning
from pruning import METHODS
from pruning.options import owners
from utils.callbacks import Callback
from utils.kept import Kept
from utils.run import fit


class Keep(Callback):
    """Remembers the state after every epoch."""

    def __init__(self):
        self.states = []

    def after_epoch(self, run, results) -> None:
        self.states.append(copy.deepcopy(run.state_dict()))


@pytest.mark.parametrize("name", METHODS)
def test_attach_adds_beside_what_is_there_and_changes_no_name(name: str):
    """Catches a method whose networks could no longer load the dense network's file."""
    dense = small_network().state_dict()
    network = small_network()
    method = pruning.create_method(name, **EAGER.get(name, {}))
    method.check(network)
    method.attach(network)
    state = network.state_dict()
    assert dense.keys() <= state.keys()
    assert all(state[key].shape == dense[key].shape for key in dense)
    for key in state.keys() - dense.keys():
        assert key.rsplit(".", 1)[0] in dict(network.named_modules()), key
        if key.endswith(".mask") and key.replace("mask", "weight") in dense and "popup" not in " ".join(state):
            weight = state[key.replace("mask", "weight")]
            assert not weight[state[key] == 0].any(), "a pruned weight is zero in every checkpoint"


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_resumes_and_finishes(name: str):
    """Catches state outside of the network and its optimisers, a finish that changes outputs, and a rate missed."""
    keep = Keep()
    run, val = run_of(name, **EAGER.get(name, {}))
    fit(run, [keep])

    again, _ = run_of(name, **EAGER.get(name, {}))
    again.load_state_dict(keep.states[0])
    fit(again, [])
    theirs = again.network.state_dict()
    assert [k for k, tensor in run.network.state_dict().items() if not torch.equal(tensor, theirs[k])] == []

    network, images = run.kept_network(), next(iter(val))[0]
    kept = pruning.finish(run.method, network, images)  # proves that outputs stay
    assert {type(module) for module in network.modules()} <= PLAIN
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(type(layer) is Kept for layer in kept.values())
    assert all(not dataclasses.is_dataclass(value) for layer in kept.values() for value in layer.to_json().values())
    masked = {layer: facts for layer, facts in kept.items() if facts.rate is not None}
    weights = {layer: network.get_submodule(layer).weight for layer in masked}
    total = sum(weight.numel() for weight in weights.values())
    for layer, facts in masked.items():
        assert 1 - float((weights[layer] != 0).double().mean()) == pytest.approx(facts.sparsity)
    wanted, got = (
        sum(getattr(facts, key) * weights[layer].numel() for layer, facts in masked.items())
        for key in ("rate", "sparsity")
    )
    assert got == pytest.approx(wanted, abs=0.02 * total), "the asked rate is reached"
    if kept and not masked:  # channels or stripes
        left, dense = (
            sum(int(layer.weight.count_nonzero()) for layer in of.modules() if isinstance(layer, torch.nn.Conv2d))
            for of in (network, small_network())
        )
        assert left < dense, "something has gone"
    assert bool(kept) == (name != "dense")
    assert run.method.shortfalls(network, kept, images[:1]) == []


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("weight", {"schedule": "cubic"}, "50.0 % of the weights were to go, but 0.0 % have gone."),
        ("block_random", {"N": 4, "blocks": "reference"}, "% of the weights were to go, but "),
        ("imp", {"k": 0.25, "rounds": 2}, "75.0 % of the weights were to go, but 50.0 % have gone."),
        ("resrep", {"flops_target": 0.6}, "--flops_target 0.6 is not reached: 1.0000 of the multiply-adds are left."),
        ("stripe", {}, "50.0 % of the stripes were to go, but 0.0 % have gone."),
        ("stripe", {"pr_unit": "macs"}, "50.0 % of the multiply-adds of layers with stripes were to go, but 0.0 %"),
        ("stripe", {"sr": 1e-5}, None),  # a strength is asked for, and no share
        ("weight", {}, None),
        ("dense", {}, None),
    ],
)
def test_what_is_asked_and_not_reached_is_said(name: str, options: dict, told: str | None):
    """Catches a run that ends in silence away from its target: here no training follows."""
    run, val = run_of(name, **options)
    images = next(iter(val))[0]
    kept = pruning.finish(run.method, run.network, images)
    sentences = run.method.shortfalls(run.network, kept, images[:1])
    assert len(sentences) == bool(told)
    assert not told or told in sentences[0]


def test_a_growing_rate_is_reached_although_batches_are_left_over():
    """Catches growth until the very end whose last selection would fall behind the last step, and a long interval."""
    run, val = run_of("weight", schedule="linear", schedule_end=1.0, schedule_every=100)
    run.batches_per_step = 4  # six batches an epoch: two are left over
    fit(run, [])
    images = next(iter(val))[0]
    kept = pruning.finish(run.method, run.network, images)
    assert run.method.shortfalls(run.network, kept, images[:1]) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_the_network_is_settled_and_finished_alone(name: str):
    """Catches a method that remembers modules of the network that it was attached to."""
    run, val = run_of(name, **EAGER.get(name, {}))
    fit(run, [])
    before, other = copy.deepcopy(run.network.state_dict()), copy.deepcopy(run.network)
    images = next(iter(val))[0]
    pruning.finish(run.method, other, images)
    after = run.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(hasattr(module, "mask") for module in other.modules())


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_checked_and_others_are_refused(name: str):
    """Catches an option without a range, and flags of other methods that pass in silence."""
    for field in dataclasses.fields(METHODS[name].options):
        wrong = []
        if field.metadata["choices"]:
            wrong.append("nonsense")
        if field.metadata["within"]:
            low, high = map(float, field.metadata["within"][1:-1].split(", "))
            number = int if "int" in str(field.type) else float
            wrong += [number(low - 1)] + ([number(high + 1)] if math.isfinite(high) else [])
            wrong += [math.nan, math.inf] if number is float else [1.5]
        for value in wrong:
            with pytest.raises(ValueError, match=f"--{field.name} ") as error:
                pruning.create_method(name, **{field.name: value})
            assert "\n" not in str(error.value)
    everything = {field.name for method in METHODS.values() for field in dataclasses.fields(method.options)}
    for foreign in sorted(everything - set(METHODS[name].own)):
        with pytest.raises(ValueError, match=f"--{foreign} belongs to {', '.join(owners(foreign))}, not to {name}"):
            pruning.create_method(name, **{foreign: 1})


def test_dense_is_a_method_that_does_nothing():
    network = models.create_model("resnet20", 10)
    before = copy.deepcopy(network.state_dict())
    method = pruning.create_method("DenseConv")
    method.attach(network)
    assert pruning.finish(method, network, torch.randn(2, 3, 32, 32)) == {}
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
