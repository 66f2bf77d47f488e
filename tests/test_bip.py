"""BiP, Hydra and IMP: published values, slow oracles, gradients against autograd and differences, laws of training."""

import copy
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill, mask_digest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import imagenet
import models
import pruning
from benchmarks import sweep
from pruning.bip import add_implicit_term
from pruning.budget import lowest
from pruning.layers import add_scores, masked_layers
from pruning.method import relative_error
from pruning.selection import UNITS, select
from utils import callbacks
from utils.files import save_json
from utils.loss import Loss
from utils.run import Run

GOLDEN = json.loads((Path(__file__).parent / "golden" / "bip.json").read_text())["resnet20s"]
DIGITS = ["--arch", "resnet20", "--data_set", "digits", "--image_size", "8", "--train_batch_size", "128", "--lr", "0.1"]
SCORED = ("bip", "hydra")


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


class Batches:
    """What of a loader a run needs; the caller moves its position."""

    epoch, batch, device, batch_size = 0, 2, torch.device("cpu"), 8

    def __len__(self) -> int:
        return 2


def run_of(network: nn.Module, epochs: int = 2, **options) -> Run:
    method = pruning.create_method(**options)
    method.attach(network)

    def make(parameters):
        return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-3)

    return Run(network, method, Batches(), Loss(), epochs, lambda *_: 0.1, make)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def state(network: nn.Module, ending: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items() if name.endswith(ending)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- which weights stay -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("case", ["unstructured|k0.1", "filter|k0.5"])
def test_published_checkpoints_give_the_published_masks_and_logits(case: str, name: str, tmp_path):
    layer_type, k = case.split("|k")
    tensors = {f"module.{key}": fill(key, tuple(shape)) for key, shape in GOLDEN[f"shapes_{layer_type}"].items()}
    torch.save(
        {"arch": "resnet20s", "epoch": 100, "best_prec1": 90.0, "state_dict": tensors}, tmp_path / "file.pth.tar"
    )
    network = models.create_model("resnet20s", 10)
    method = pruning.create_method(name, layer_type=layer_type, k=float(k))
    method.accept(models.load_checkpoint(network, tmp_path / "file.pth.tar")["extras"])
    method.attach(network)
    masks = {name: layer.mask for name, layer in masked_layers(network).items()}
    digests = {{"fc": "linear"}.get(name, name): digest for name, digest in GOLDEN[case]["digests"].items()}
    assert {name: mask_digest(mask) for name, mask in masks.items()} == digests
    assert sum(int(mask.sum()) for mask in masks.values()) == GOLDEN[case]["kept"]
    images = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 32, 32)).astype(np.float32))
    pruning.finish(method, network, images)
    with torch.no_grad():
        assert relative_error(network(images), torch.tensor(GOLDEN[case]["logits"])) < 1e-4


@pytest.mark.parametrize(
    ("arch", "name"), [("resnet18_cifar", "imp"), ("wrn_28_1", "bip"), ("wrn_28_1", "hydra"), ("wrn_28_1", "imp")]
)
def test_the_published_ranking_of_all_scores_gives_the_masks(arch: str, name: str, tmp_path):
    """Catches scores of a linear layer refused where ours is a 1x1 convolution, and scores of unused layers dropped.

    As published, a wide ResNet holds a `sub_block1` that nothing is computed with, but its scores are ranked.
    """
    torch.manual_seed(0)
    network = models.create_model(arch, 10)
    theirs = {key: t.flatten(1) if key == "fc.weight" else t for key, t in network.state_dict().items()}
    if arch == "resnet18_cifar":
        rename = (("fc.", "linear."), ("downsample", "shortcut"))
        theirs = {key.replace(*rename[0]).replace(*rename[1]): tensor for key, tensor in theirs.items()}
    else:
        theirs |= {key.replace("block1", "sub_block1"): t for key, t in theirs.items() if key.startswith("block1")}
    weights = {key: t for key, t in theirs.items() if t.dim() > 1}
    scores = {key.replace("weight", "popup_scores"): torch.randn_like(t) for key, t in weights.items()}
    torch.save({"state_dict": theirs | scores}, tmp_path / "model_best.pth.tar")

    method = pruning.create_method(name, k=0.3)
    method.accept(models.load_checkpoint(network, tmp_path / "model_best.pth.tar")["extras"])
    method.attach(network)
    sizes = torch.cat([tensor.abs().flatten() for tensor in scores.values()])
    smallest_kept = sizes.sort().values[int((1 - 0.3) * len(sizes))]
    layers = masked_layers(network)
    ours = {layer: layer if arch == "wrn_28_1" else layer.replace("fc", "linear") for layer in layers}
    for layer, module in layers.items():
        own = scores[f"{ours[layer].replace('downsample', 'shortcut')}.popup_scores"]
        size = own.abs().view_as(module.mask)
        decided = size != smallest_kept  # of equal ones any may stay
        assert torch.equal(module.mask[decided], (size > smallest_kept)[decided].float()), layer
    before = set(models.create_model(arch, 10).state_dict())
    pruning.finish(method, network, torch.randn(2, 3, 32, 32))
    assert set(network.state_dict()) == before
    assert not hasattr(network, "ranked_beside")


def test_scores_find_only_methods_that_know_them(tmp_path):
    network = models.create_model("resnet20s", 10)
    tensors = {key: fill(key, tuple(shape)) for key, shape in GOLDEN["shapes_filter"].items()}
    torch.save(tensors, tmp_path / "scores.pt")
    extras = models.load_checkpoint(network, tmp_path / "scores.pt")["extras"]
    with pytest.raises(ValueError, match=r"holds conv1\.popup_scores, of which method dense makes no use"):
        pruning.create_method("dense").accept(extras)
    method = pruning.create_method("bip", layer_type="unstructured")
    method.accept(extras)
    with pytest.raises(ValueError, match=r"--layer_type unstructured.*scores of linear are missing, .* \(10, 64\)"):
        method.attach(network)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.data())
def test_the_selection_is_that_of_a_stable_sort(values: list[int], data):
    scores, pruned = torch.tensor(values).float(), data.draw(st.integers(0, len(values) - 1))
    expected = torch.ones(len(values), dtype=torch.bool)
    expected[scores.argsort(stable=True)[:pruned]] = False
    assert torch.equal(~lowest(scores, pruned), expected)


def test_published_counts_are_literal():
    """int((1 - k) * n) in double precision: not what one expects."""
    for k, n, pruned in ((0.8, 160, 31), (0.9, 160, 15), (0.7, 10, 3), (1.0, 10, 0)):
        mask = select({"layer": torch.rand(n, 1, 1, 1)}, UNITS["unstructured"].pattern, k, everywhere=False)["layer"]
        assert int((~mask).sum()) == pruned


def oracle(scores: np.ndarray, layer_type: str, k: float, N: int) -> np.ndarray:
    """Group by group: the norms of what lives and dies together, the least of them cleared."""
    O, I = scores.shape[:2]
    groups = {
        "unstructured": [np.unravel_index(i, scores.shape) for i in range(scores.size)],
        "filter": [(o,) for o in range(O)],
        "channel": [(slice(None), i) for i in range(I)],
        "block": [(slice(o, o + N), i) for o in range(0, O, N) for i in range(I)],
    }[layer_type]
    size = [np.sqrt(np.mean(np.square(scores[group]))) for group in groups]
    mask = np.ones(scores.shape, bool)
    for number in np.argsort(size, kind="stable")[: int((1 - k) * len(groups))]:
        mask[groups[number]] = False
    return mask


def pattern_of(layer_type: str):
    return UNITS[layer_type].pattern.of(4 if layer_type == "block" else 1)


@pytest.mark.parametrize("layer_type", UNITS)
@pytest.mark.parametrize("k", [0.8, 0.3, 0.05])
@pytest.mark.parametrize("O", [12, 14])
def test_masks_are_those_of_a_slow_oracle(layer_type: str, k: float, O: int):
    scores = torch.from_numpy(np.random.default_rng(0).standard_normal((O, 10, 3, 3)))
    for layout in (torch.contiguous_format, torch.channels_last):
        given = {"a": scores.contiguous(memory_format=layout)}
        mask = select(given, pattern_of(layer_type), k, everywhere=False)["a"]
        assert np.array_equal(mask.numpy(), oracle(scores.numpy(), layer_type, k, 4))


@pytest.mark.parametrize("layer_type", UNITS)
def test_a_global_budget_ranks_all_layers_together(layer_type: str):
    torch.manual_seed(0)
    scores = {"small": 0.1 * torch.rand(8, 4, 3, 3), "large": 1 + torch.rand(8, 8, 1, 1)}
    masks = select(scores, pattern_of(layer_type), 0.5, everywhere=True)
    groups = {name: len({tuple(row) for row in oracle_groups(scores[name], layer_type)}) for name in scores}
    dead = int((1 - 0.5) * sum(groups.values()))
    pruned = {name: groups[name] * (1 - mask.double().mean().item()) for name, mask in masks.items()}
    assert sum(pruned.values()) == pytest.approx(dead)
    spared = 0 if layer_type == "unstructured" else 1
    assert pruned["small"] == pytest.approx(min(dead, groups["small"] - spared)), "the smaller scores go first"


def oracle_groups(scores: torch.Tensor, layer_type: str) -> list[tuple[int, ...]]:
    o, i, y, x = (axis.flatten().tolist() for axis in torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij"))
    key = {
        "unstructured": lambda o, i, y, x: (o, i, y, x),
        "filter": lambda o, i, y, x: (o,),
        "channel": lambda o, i, y, x: (i,),
        "block": lambda o, i, y, x: (o // 4, i),
    }[layer_type]
    return list(map(key, o, i, y, x))


def test_what_is_left_dense():
    network = models.create_model("resnet18_cifar", 10)

    def scored(layer_type: str, fidelity: str = "paper") -> set[str]:
        return set(pruning.create_method("bip", layer_type=layer_type, fidelity=fidelity).layers(network))

    everything = scored("unstructured")
    assert {"conv1", "fc"} < everything
    assert scored("filter") == everything - {"fc"}
    assert scored("channel") == scored("block") == everything - {"fc", "conv1"}
    assert scored("channel", "reference") == everything - {"fc"}, "the published code prunes the stem, too"


# --- how scores learn -------------------------------------------------------------------------------------------------


def scored_layer() -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(6, 5, bias=False).double()
    add_scores(layer, torch.randn(5, 6).double())
    layer.mask.copy_(torch.rand(5, 6) < 0.5)
    return layer


def test_straight_through_gradients_are_those_of_the_published_expression():
    layer, x = scored_layer(), torch.randn(3, 6).double()
    weight, scores = (parameter.detach().clone().requires_grad_() for parameter in (layer.weight, layer.popup_scores))
    size = scores.abs()
    masked = weight * (size + (layer.mask - size).detach())  # the mask's value, the gradient of |s|
    nn.functional.linear(x, masked).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.allclose(layer.weight.grad, weight.grad)
    assert torch.allclose(layer.popup_scores.grad, scores.grad)


def test_the_implicit_gradient_is_exact_where_the_loss_is_linear_in_the_masked_weights():
    """l(z) = sum a z, so theta*(m) = -m a / gamma, and differences of l(m theta*(m)) by every mask entry are known."""
    layer, gamma = scored_layer(), 0.7
    a, mask = torch.randn(5, 6).double(), layer.mask.clone()

    def upper(mask: torch.Tensor) -> float:
        best = -mask * a / gamma
        return float((a * mask * best).sum())

    with torch.no_grad():
        layer.weight.copy_(-mask * a / gamma)
    (layer(torch.eye(6).double()).T * a).sum().backward()
    add_implicit_term([layer], 1 / gamma)
    for index in np.ndindex(5, 6):
        step = torch.zeros_like(mask)
        step[index] = 1e-4
        difference = (upper(mask + step) - upper(mask - step)) / 2e-4
        expected = difference * float(layer.popup_scores[index].detach().sign())
        assert float(layer.popup_scores.grad[index]) == pytest.approx(expected, abs=1e-6)


def test_the_two_levels_move_each_their_own():
    run = run_of(tiny(), name="bip", k=0.5)
    run.network.train()
    weights, scores = state(run.network, "weight"), state(run.network, "popup_scores")
    run.method.lower(run, [batch(0)])
    assert not same(state(run.network, "weight"), weights)
    assert same(state(run.network, "popup_scores"), scores)
    weights = state(run.network, "weight")
    run.method.upper(run, [batch(1)], 1e-4)
    assert same(state(run.network, "weight"), weights)
    assert not same(state(run.network, "popup_scores"), scores)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1


def test_hydra_freezes_weights_and_biases_and_trains_batch_norm():
    run = run_of(tiny(), name="hydra", k=0.5)
    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    run.step(batch(0))
    changed = {name for name, tensor in run.network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if name.endswith(("weight", "bias"))} == {
        f"{number}.{kind}" for number in (1, 4) for kind in ("weight", "bias")
    }
    assert {f"{number}.popup_scores" for number in (0, 3, 8)} < changed
    run.method.finish(run.network)
    assert all(parameter.requires_grad for parameter in run.network.parameters())


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("fidelity", ["paper", "reference"])
def test_masks_follow_the_scores(fidelity: str, accelerate: bool, monkeypatch):
    run = run_of(tiny(), name="bip", k=0.3, fidelity=fidelity, accelerate=accelerate)
    selections = []
    monkeypatch.setattr("pruning.selection.select", lambda *a, **k: selections.append(1) or select(*a, **k))
    for step in range(3):
        run.step(batch(2 * step), batch(2 * step + 1))
    assert len(selections) == (6 if fidelity == "reference" else 3), "the published code selects at either level"
    layers = masked_layers(run.network)
    scores = {name: layer.popup_scores.detach() for name, layer in layers.items()}
    expected = select(scores, UNITS["unstructured"].pattern, 0.3, True)
    assert all(torch.equal(layer.mask, expected[name].float()) for name, layer in layers.items())
    shared = [torch.equal(layer.weight, layer.popup_scores) for layer in layers.values()]
    assert shared == [fidelity == "reference"] * 3, "the published code's scores share their memory with weights"


def test_schedules_of_scores():
    paper = pruning.create_method("bip", mask_lr=0.2, mask_lr_policy="step", lr=0.01)
    assert [paper.mask_rate(t) for t in (0, 0.74, 0.75, 0.9)] == pytest.approx([0.2, 0.2, 0.02, 0.002])
    code = pruning.create_method("bip", mask_lr=0.2, mask_lr_policy="step", lr=0.01, fidelity="reference")
    assert [code.mask_rate(t) for t in (0, 0.5, 0.75)] == pytest.approx([0.01, 0.001, 0.0001])
    cosine = pruning.create_method("bip", mask_lr=0.2)
    assert [cosine.mask_rate(t) for t in (0, 0.5)] == pytest.approx([0.2, 0.1])


def test_random_scores_leave_the_weights_scale_to_the_share_kept():
    network = tiny()
    weight = network[3].weight.detach().clone()
    pruning.create_method("hydra", score_init="random", k=0.25).attach(network)
    assert torch.allclose(network[3].weight, 2 * weight)
    assert not torch.allclose(network[3].popup_scores.abs() / weight.abs(), torch.ones(()), atol=0.1)


# --- the published step -----------------------------------------------------------------------------------------------


class CifarBatches(Batches):
    batch_size = 16


def their_name(ours: str) -> str:
    return ours.replace("linear.", "fc.")


def published_run(layer_type: str, accelerate: bool, shared: bool) -> Run:
    """A run in float64, as tests/golden/bip_steps.json was made."""
    network = models.create_model("resnet20s", 10)
    network.load_state_dict({n: fill(their_name(n), tuple(t.shape)) for n, t in network.state_dict().items()})
    network.double()
    own = {"layer_type": layer_type, "accelerate": accelerate, "k": 0.2, "lr2": 0.01, "lr": 0.01}
    method = pruning.create_method("bip", fidelity="reference", **own)
    if not shared:
        names = {f"{layer}.popup_scores": weights.weight.shape for layer, weights in method.layers(network).items()}
        method.accept({name: fill(their_name(name), tuple(shape)) for name, shape in names.items()})
    method.attach(network)
    return Run(network, method, CifarBatches(), Loss(), 10, lambda *_: 0.01, published_sgd)


def published_sgd(parameters) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=5e-4)


def pictures(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.RandomState(seed)
    pairs = [(rng.standard_normal((16, 3, 32, 32)), rng.randint(0, 10, 16)) for _ in range(3)]
    return [(torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in pairs]


STEPS = json.loads((Path(__file__).parent / "golden" / "bip_steps.json").read_text())


@pytest.mark.parametrize("case", STEPS)
def test_every_tensor_moves_as_in_the_published_code(case: str):
    """Catches any difference from the published step: who learns, decays or has momentum, masks, batch statistics."""
    layer_type, accelerate, shared = case.split("|")
    run = published_run(layer_type, accelerate == "accelerate=True", shared == "shared=True")
    start = {their_name(name): tensor.clone() for name, tensor in run.network.state_dict().items()}
    for number, (train, val) in enumerate(zip(pictures(1), pictures(2), strict=True), start=1):
        run.step(val, train)
        if f"after {number}" not in STEPS[case]:
            continue
        now = {their_name(name): tensor for name, tensor in run.network.state_dict().items()}
        for name, (total, norm) in STEPS[case][f"after {number}"].items():
            movement = now[name] - start[name]
            allowed = 1e-9 * norm + 5e-13  # the file has twelve decimals
            assert float(movement.sum()) == pytest.approx(total, rel=0, abs=allowed), name
            assert float(movement.norm()) == pytest.approx(norm, rel=0, abs=allowed), name


@torch.no_grad()
def choose_masks(run: Run) -> None:
    layers = masked_layers(run.network)
    everywhere = run.method.unit.budget == "global"
    masks = select({n: layer.popup_scores for n, layer in layers.items()}, run.method.pattern, 0.2, everywhere)
    for name, layer in layers.items():
        layer.mask.copy_(masks[name])


def literal_step(run: Run, optimizers: list, first, second) -> None:
    """The published step as it was published, with parameters that are frozen and gradients that are zeroed."""
    network, options = run.network, run.method.options
    kinds = {"scores": [layer.popup_scores for layer in masked_layers(network).values()]}
    kinds["weights"] = [p for m in network.modules() if not isinstance(m, nn.BatchNorm2d)
                        for n, p in m.named_parameters(recurse=False) if n != "popup_scores"]  # fmt: skip

    def level(learns: tuple[str, ...], batch, optimizer) -> None:
        for kind, parameters in kinds.items():
            for parameter in parameters:
                parameter.requires_grad_(kind in learns)
        choose_masks(run)
        loss = nn.functional.cross_entropy(network(batch[0]), batch[1])
        optimizer.zero_grad(set_to_none=False)
        loss.backward()

    if options.accelerate:
        level(("scores",), first, optimizers[1])
        optimizers[1].step()
        level(("weights",), second, optimizers[0])
        optimizers[0].step()
        return
    level(("weights",), first, optimizers[0])
    optimizers[0].step()
    level(("scores", "weights"), second, optimizers[0])
    everything = [parameter.grad.clone() for parameter in network.parameters()]
    level(("scores",), second, optimizers[1])
    for parameter, gradient in zip(network.parameters(), everything, strict=True):
        parameter.grad += -options.lr2 * parameter.grad * gradient
    optimizers[1].step()
    choose_masks(run)
    network(second[0])  # for the log


@pytest.mark.parametrize("layer_type", ["unstructured", "filter", "channel"])
@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("score_init", ["magnitude", "random"])
def test_the_published_step_is_that_of_a_literal_oracle(layer_type: str, accelerate: bool, score_init: str):
    """Catches a difference in the cases of which there are no published values; "random" scores share no memory."""
    own = {"layer_type": layer_type, "accelerate": accelerate, "score_init": score_init, "k": 0.2, "lr2": 0.01}
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        network = tiny().double()
        method = pruning.create_method("bip", fidelity="reference", lr=0.01, **own)
        method.attach(network)
        runs.append(Run(network, method, Batches(), Loss(), 10, lambda *_: 0.01, published_sgd))
    ours, theirs = runs
    optimizers = [published_sgd(theirs.network.parameters()) for _ in range(2)]
    for step in range(3):
        batches = [(batch(2 * step + i)[0].double(), batch(2 * step + i)[1]) for i in range(2)]
        ours.step(*batches)
        literal_step(theirs, optimizers, *batches)
    choose_masks(theirs)
    expected = theirs.network.state_dict()
    for name, tensor in ours.network.state_dict().items():
        assert relative_error(tensor.double(), expected[name].double()) < 1e-12, name


# --- rounds of magnitude pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewind", [True, False])
def test_rounds_prune_equal_shares_of_what_is_left_and_rewind(rewind: bool):
    network = tiny()
    start = copy.deepcopy(network.state_dict())
    run = run_of(network, epochs=3, name="imp", k=0.125, rounds=3, rewind=rewind)
    run.loader.batch, seen = 1, []
    for run.loader.epoch in range(3):
        seen.append({name: layer.mask.clone() for name, layer in masked_layers(network).items()})
        if run.loader.epoch:
            run.method.begin_round(run, run.loader.epoch)
            layers = masked_layers(network)
            for name, layer in layers.items():
                assert (layer.mask <= seen[-1][name]).all()
                assert torch.equal(layer.weight, start[f"{name}.weight"] * layer.mask) == rewind
        total = sum(mask.numel() for mask in state(network, "mask").values())
        kept = sum(int(mask.sum()) for mask in state(network, "mask").values())
        assert kept == total - int((1 - 0.5 ** (run.loader.epoch + 1)) * total)
        run.loader.batch = 2
        run.step(batch(run.loader.epoch))


def test_a_round_begins_with_the_first_step_of_its_epoch(monkeypatch):
    run = run_of(tiny(), epochs=4, name="imp", k=0.25, rounds=2)
    begun = []
    monkeypatch.setattr(
        run.method, "begin_round", lambda run, number: begun.append((run.epoch, run.loader.batch, number))
    )
    for run.loader.epoch in range(4):
        for run.loader.batch in (1, 2):
            run.step(batch(0))
    assert begun == [(2, 1, 1)]


def test_dead_filters_are_silent():
    network = tiny()
    method = pruning.create_method("imp", layer_type="filter", k=0.5)
    method.attach(network)
    dead = ~masked_layers(network)["0"].mask.flatten(1).any(1)
    with torch.no_grad():
        network[1].bias.add_(1)
        network[1].running_mean.fill_(0.3)
    method.settle(network)
    assert dead.sum() == 4
    seen = network.eval()[:3](batch(0)[0])
    assert not seen[:, dead].any()
    assert seen[:, ~dead].any()


# --- the road of imagenet.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18_cifar", "mobilenet_v2", "vgg16_bn", "wrn_28_1"])
def test_filters_of_any_network_can_go(arch: str):
    network = models.create_model(arch, 10)
    method = pruning.create_method("imp", layer_type="filter", k=0.5)
    method.attach(network)
    images = torch.randn(2, 3, 32, 32)
    pruning.finish(method, network, images)
    smaller, _ = pruning.proven_copy(network, pruning.shrink, images)
    assert sum(p.numel() for p in smaller.parameters()) < 0.8 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", [*SCORED, "imp"])
@pytest.mark.parametrize("layer_type", UNITS)
def test_finish_folds_masks_and_leaves_plain_layers(name: str, layer_type: str):
    network = tiny()
    keys = set(network.state_dict())
    method = pruning.create_method(name, layer_type=layer_type, k=0.25, N=4 if layer_type == "block" else None)
    method.attach(network)
    added = {key.rsplit(".", 1)[1] for key in network.state_dict().keys() - keys}
    assert added == {"mask"} | ({"popup_scores"} if name in SCORED else set())
    masks = {key: layer.mask.clone() for key, layer in masked_layers(network).items()}
    kept = pruning.finish(method, network, batch(0)[0])
    assert set(network.state_dict()) == keys
    assert all(type(layer) in (nn.Conv2d, nn.Linear) for layer in network.modules() if hasattr(layer, "in_features"))
    for key, mask in masks.items():
        assert torch.equal(network.get_submodule(key).weight != 0, mask.bool())
        assert kept[key].sparsity == pytest.approx(1 - float(mask.mean()))


def test_learned_blocks_are_rows_that_the_compiler_finds():
    network = models.create_model("resnet20", 10)
    method = pruning.create_method("bip", layer_type="block", N=8, k=0.25)
    method.attach(network)
    kept = method.finish(network)
    assert {layer.N for layer in kept.values()} == {8}
    found = pruning.find_blocks(network, 8)
    assert found == dict.fromkeys(kept, (8, "1x8, intact"))


@pytest.fixture(scope="module")
def bip(tmp_path_factory) -> list[str]:
    """The command of a run of BiP, all but its folder, and a dense network to start from."""
    job_dir = tmp_path_factory.mktemp("dense")
    imagenet.main([*DIGITS, "--method", "dense", "--num_epochs", "3", "--job_dir", str(job_dir)])
    start = ["--pretrained_model", str(job_dir / "checkpoint" / "final.pt")]
    return [*DIGITS, *start, "--method", "bip", "--k", "0.3", "--num_epochs", "2", "--job_dir"]


@pytest.fixture(scope="module")
def learned(bip: list[str], tmp_path_factory) -> Path:
    job_dir = tmp_path_factory.mktemp("bip")
    imagenet.main([*bip, str(job_dir)])
    return job_dir


def test_learned_masks_are_better_than_those_they_start_from(learned: Path):
    accuracy = json.loads((learned / "summary.json").read_text())["accuracy"]
    assert accuracy["tuned"]["top1"] > max(50, accuracy["pruned"]["top1"])


def test_an_interrupted_run_ends_with_the_same_weights_and_scores(learned: Path, bip: list[str], tmp_path, monkeypatch):
    """Stopped in the middle of an epoch; both optimisers' momentum and both schedules go on."""
    arguments = [*bip, str(tmp_path), "--resume"]
    original = callbacks.Save.after_step

    def after_step(self, run):
        if run.iteration == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, run)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Save, "after_step", after_step)
        with pytest.raises(SystemExit) as end:
            imagenet.main(arguments)
    assert end.value.code == 143
    imagenet.main(arguments)
    for name in ("last", "final"):
        ours, theirs = (
            torch.load(folder / "checkpoint" / f"{name}.pt")["state_dict"] for folder in (tmp_path, learned)
        )
        assert same(ours, theirs), name


def test_fine_tuning_keeps_the_learned_masks(learned: Path, tmp_path):
    """Whether from the folded network or from a checkpoint of the training, which has the scores."""
    for name in ("final", "last"):
        file = learned / "checkpoint" / f"{name}.pt"
        start = ["--pretrained_model", str(file), "--exp_mode", "finetune", "--k", "0.3"]
        imagenet.main([*DIGITS, "--method", "bip", *start, "--num_epochs", "1", "--job_dir", str(tmp_path / name)])
        tuned = torch.load(tmp_path / name / "checkpoint" / "final.pt")["state_dict"]
        before = torch.load(learned / "checkpoint" / "final.pt")["state_dict"]
        weights = [key for key in tuned if key.endswith("weight") and tuned[key].dim() > 1]
        assert all(torch.equal(tuned[key] != 0, before[key] != 0) for key in weights)
        assert not all(torch.equal(tuned[key], before[key]) for key in weights)


@pytest.mark.parametrize(("name", "layer_type"), [("imp", "filter"), ("bip", "channel"), ("hydra", "channel")])
def test_dead_channels_are_sliced_out_of_a_network_that_stays_the_same(name: str, layer_type: str):
    network = models.create_model("resnet20", 10)
    method = pruning.create_method(name, layer_type=layer_type, k=0.5)
    method.attach(network)
    images = torch.randn(2, 3, 32, 32)
    pruning.finish(method, network, images)
    smaller, _ = pruning.proven_copy(network, pruning.shrink, images)
    widths = models.widths(smaller)
    inner = [width for layer, width in widths.items() if layer.endswith("conv1") and "layer" in layer]
    assert inner == 3 * [8] + 3 * [16] + 3 * [32], "half of the channels within every block"


def test_a_shrunk_network_is_written_and_evaluated(tmp_path, capsys):
    pruned = ["--method", "imp", "--layer_type", "filter", "--k", "0.5", "--shrink", "--num_epochs", "1"]
    imagenet.main([*DIGITS, *pruned, "--job_dir", str(tmp_path)])
    final = torch.load(tmp_path / "checkpoint" / "final.pt")
    assert final["state_dict"]["layer1.0.conv1.weight"].shape == (8, 16, 3, 3)
    told = json.loads((tmp_path / "summary.json").read_text())["accuracy"]["tuned"]["top1"]
    capsys.readouterr()
    imagenet.main([*DIGITS, "--evaluate", str(tmp_path / "checkpoint" / "final.pt")])
    assert f"top-1 {told:.2f}" in capsys.readouterr().out


def test_published_scores_are_evaluated_with_their_method(tmp_path, capsys):
    tensors = {key: fill(key, tuple(shape)) for key, shape in GOLDEN["shapes_unstructured"].items()}
    torch.save({"arch": "resnet20s", "state_dict": tensors}, tmp_path / "file.pth.tar")
    arguments = ["--arch", "resnet20s", *DIGITS[2:], "--evaluate", str(tmp_path / "file.pth.tar")]
    imagenet.main([*arguments, "--method", "bip", "--k", "0.1"])
    assert "sparsity 90.00 %" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"of which method 1x16 blocks.* makes no use"):
        imagenet.main(arguments)


def test_a_sweep_runs_what_is_missing_and_draws_what_is_there(tmp_path, monkeypatch):
    ran = []

    def run(program: str, *arguments: object) -> None:
        options = imagenet.parse([str(argument) for argument in arguments])
        k, rounds = (getattr(options.own, name, 1) for name in ("k", "rounds"))
        ran.append((options.conv_type, k, rounds, options.seed, options.lr))
        save_json(options.job_dir / "summary.json", {"accuracy": {"tuned": {"top1": 90 + k}}})

    monkeypatch.setattr(sweep, "run", run)
    own = ["--method", "bip", "imp --rounds 2 --lr 0.2", "--k", "0.5", "0.25", "--seed", "3", "4"]
    monkeypatch.setattr("sys.argv", ["sweep.py", *own, "--job_dir", str(tmp_path), "--lr", "0.1"])
    sweep.main()
    points = [("bip", k, 1, seed, 0.1) for k in (0.5, 0.25) for seed in (3, 4)]
    points += [("imp", k, 2, seed, 0.2) for k in (0.5, 0.25) for seed in (3, 4)]
    assert ran == [("dense", 1, 1, 3, 0.1), ("dense", 1, 1, 4, 0.1), *points]
    assert "| imp --rounds 2 --lr 0.2 | 0.25 | 90.25 | 90.25 | 90.25 |" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bip_k0.25_seed4" / "summary.json").unlink()
    ran.clear()
    sweep.main()
    assert ran == [("bip", 0.25, 1, 4, 0.1)], "the others are there"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "--k 0: must be in"),
        ({"layer_type": "row"}, "--layer_type row: one of unstructured, filter, channel, block"),
        ({"layer_type": "block", "N": 99}, "--N 99: longer than the widest layer"),
        ({"budget": "some"}, "--budget some: one of uniform, global"),
        ({"fidelity": "none"}, "--fidelity none: one of paper, reference"),
        ({"score_init": "zero"}, "--score_init zero: one of magnitude, random"),
        ({"mask_lr": -1}, "--mask_lr -1"),
        ({"mask_lr_policy": "exp"}, "--mask_lr_policy exp: one of cos, step"),
        ({"name": "imp", "rounds": 0}, "--rounds 0"),
        ({"name": "weight", "exp_mode": "finetune"}, "--exp_mode belongs to bip, hydra, not to weight"),
    ],
)
def test_mistakes_are_told_in_the_users_words(options: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        pruning.create_method(**{"name": "bip"} | options).check(models.create_model("resnet20", 10))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("option", ["lr2", "mask_lr", "k"])
def test_what_is_no_finite_number_is_refused_on_the_command_line(option: str, number: str):
    """Catches a weight of the implicit gradient that is not a number, by which every weight would go."""
    with pytest.raises(ValueError, match=f"--{option} {number}: must be "):
        imagenet.parse(["--method", "bip", f"--{option}={number}"])


def test_epochs_must_divide_into_rounds():
    with pytest.raises(ValueError, match="--num_epochs 10: must divide into 3 rounds"):
        imagenet.main([*DIGITS, "--method", "imp", "--rounds", "3", "--num_epochs", "10"])
