"""Repair without training: the laws of its least squares, and networks whose outputs come closer to the dense ones."""

import copy
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import imagenet
import pruning
from pruning import reconstruction
from pruning.layers import masked_layers
from pruning.reconstruction import Moments, Problem, least_squares
from pruning.repair import repair
from pruning.score import Calibration
from pruning.targets import sampled
from structure import CHANGED, DENSE, Walk
from utils import callbacks

PLAIN_ORDER = torch.arange(64)


def problem(O: int, p: int, seed: int = 0, coupled: bool = False, positions: int = 400, dead: int = 0) -> Problem:
    """The least squares of a random layer whose `dead` last columns are always zero."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(p, p, generator=chance)
    x = torch.randn(1, positions, p, generator=chance) @ mixed
    if dead:
        x[..., -dead:] = 0
    weight = torch.randn(O, p, generator=chance)
    y = x @ weight.T + 0.1 * torch.randn(1, positions, O, generator=chance)
    g = torch.randn(O, 3 * O, generator=chance)
    cost = g @ g.T if coupled else torch.rand(O, generator=chance) + 0.1
    return Problem(Moments.of(x, y).means(centred=True), weight, cost)


def network_of() -> nn.Sequential:
    """Convolutions of several kinds behind each other, with statistics as training leaves them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), Branch(16),
        nn.Conv2d(16, 16, 3, 2, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    for _ in range(20):
        network(pixels(32, 3))
    return network.eval()


def pixels(count: int, seed: int) -> Tensor:
    """Smooth pictures: neighbours are alike, so that weights can make up for each other."""
    noise = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, 8, mode="bilinear")


class Branch(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)))))


def pictures(count: int = 160) -> Calibration:
    images = pixels(count, 1)
    labels = torch.zeros(count, dtype=torch.int64)  # which no repair reads
    return Calibration(lambda: zip(images.split(40), labels.split(40), strict=True), F.cross_entropy)


def repaired(name: str, **options) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The dense network, the pruned one, and the repaired one, all of plain layers."""
    dense, network = network_of(), network_of()
    method = pruning.create_method(name, **options)
    method.attach(network, pictures())
    pruned = copy.deepcopy(network)
    method.calibrate(network, dense, pictures())
    for of in (pruned, network):
        pruning.finish(method, of, torch.randn(4, 3, 8, 8))
    return dense, pruned, network


def distance(network: nn.Module, dense: nn.Module) -> float:
    images = pixels(64, 2)
    with torch.no_grad():
        return float((network(images) - dense(images)).square().mean())


# Least squares under a mask


@given(st.integers(1, 9), st.integers(2, 14), st.floats(0, 0.9), st.booleans(), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_refit_is_zero_under_the_mask_and_loses_least(O: int, p: int, rate: float, coupled: bool, seed: int):
    """No weight on the support is better: neither the masked dense one, nor the one found moved a little."""
    of, chance = problem(O, p, seed, coupled), torch.Generator().manual_seed(seed)
    mask = torch.rand(O, p, generator=chance) >= rate
    found = of.refit(mask)
    assert not found[~mask].any()
    least = of.loss(found)
    tolerance = 1e-6 * abs(least) + 1e-9
    assert least <= of.loss(of.dense * mask) + tolerance
    for _ in range(3):
        step = torch.randn(O, p, generator=chance, dtype=found.dtype) * mask
        assert least <= of.loss(found + 1e-3 * step) + tolerance


def test_the_first_block_to_go_and_its_price_are_those_of_brute_force():
    """The price is what the loss rises by between two refits; of single weights and of 1xN blocks, for each N rows."""
    for N, size in ((1, 1), (2, 3), (3, 1)):
        of = problem(5, 12, seed=N)
        prices = of.prices(N, size, 0.1, PLAIN_ORDER[:5])
        full = torch.ones(5, 12, dtype=torch.bool)
        before, blocks = of.loss(of.refit(full)), 12 // size
        for group, own in enumerate(prices):
            rises = []
            for block in range(blocks):
                mask = full.clone()
                mask[group * N : (group + 1) * N, block * size : (block + 1) * size] = False
                rises.append(of.loss(of.refit(mask)) - before)
            assert float(own[rises.index(min(rises))]) == pytest.approx(min(rises), rel=1e-3)
            assert own[rises.index(min(rises))] == own.min()


def test_greedy_choice_is_close_to_the_best_of_all_supports():
    """Three of eight inputs go: of 56 supports, the one chosen is among the best three."""
    for seed in range(5):
        of = problem(4, 8, seed)
        prices = of.prices(4, 1, 0.3, PLAIN_ORDER[:4])[0]
        losses = {}
        for gone in itertools.combinations(range(8), 3):
            mask = torch.ones(4, 8, dtype=torch.bool)
            mask[:, list(gone)] = False
            losses[gone] = of.loss(of.refit(mask))
        chosen = tuple(sorted(prices.argsort()[:3].tolist()))
        assert sorted(losses, key=losses.get).index(chosen) < 3


def test_dead_inputs_go_first_and_cost_nothing():
    of = problem(4, 12, dead=5)
    prices = of.prices(4, 1, 0.5, PLAIN_ORDER[:4])[0]
    assert set(prices.argsort()[:5].tolist()) == {7, 8, 9, 10, 11}
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, 7:] = False
    assert of.moments.error(of.refit(mask)) == pytest.approx(
        of.moments.error(of.refit(torch.ones_like(mask))), abs=1e-9
    )


def test_inputs_that_never_change_can_be_fitted():
    """Catches variances that rounding makes negative, which have no square root."""
    x = torch.full((1, 3000, 6), 0.1) * torch.arange(1, 7)
    means, weight = Moments.of(x, x @ torch.ones(6, 4)).means(centred=True), torch.ones(4, 6)
    mask = torch.arange(24).view(4, 6) % 3 > 0
    assert torch.allclose(Problem(means, weight, torch.ones(4)).refit(mask), mask.double())
    assert torch.allclose(least_squares(means, weight), weight.double())


def test_rows_that_form_blocks_can_stand_anywhere():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    of = problem(6, 12)
    moved = copy.deepcopy(of)
    moved.C, moved.cost = of.C[order], of.cost[order]
    assert torch.allclose(of.prices(2, 1, 0.5, order), moved.prices(2, 1, 0.5, PLAIN_ORDER[:6]))


def test_a_shared_inverse_chooses_nearly_as_well(monkeypatch):
    """Catches rounds that do not update the weights: their choice would lose about as much as magnitude's."""
    losses = dict.fromkeys(("own", "shared", "magnitude"), 0.0)
    for seed in range(4):
        of = problem(8, 64, seed, positions=2000)
        prices = {"magnitude": of.dense.abs().view(1, 8, 32, 2).sum((1, 3))}
        for name, limit in (("own", 1e12), ("shared", 0)):
            monkeypatch.setattr(reconstruction, "OWN_INVERSE", limit)
            prices[name] = of.prices(8, 2, 0.5, PLAIN_ORDER[:8])
        for name, own in prices.items():
            losses[name] += of.loss(of.refit(kept_by(own, 8, 2)))
    assert losses["own"] < losses["shared"] < 0.3 * losses["own"] + 0.7 * losses["magnitude"]


def kept_by(prices: Tensor, N: int, size: int) -> Tensor:
    mask = torch.ones(prices.numel(), dtype=torch.bool)
    mask[prices.flatten().argsort()[: len(mask) // 2]] = False
    return mask.view_as(prices).repeat_interleave(N, 0).repeat_interleave(size, 1)


@pytest.mark.parametrize("centred", [True, False])
def test_the_error_is_what_the_layer_leaves_of_its_outputs(centred: bool):
    x, y, weight = torch.randn(1, 500, 6) + 2, torch.randn(1, 500, 3) - 1, torch.randn(3, 6)
    of = Problem(Moments.of(x, y).means(centred), weight, torch.ones(3))
    residual, total = (y - x @ weight.T)[0], y[0]
    if centred:
        residual, total = residual - residual.mean(0), total - total.mean(0)
    assert of.moments.error(weight) == pytest.approx(float(residual.square().sum() / total.square().sum()), rel=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2)), nn.Linear(4, 5),
        nn.Conv2d(4, 6, 3, dilation=2, padding="same"), nn.Conv2d(4, 8, 3, 2, groups=4), nn.Conv2d(4, 4, 1, 2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)  # fmt: skip
def test_columns_times_weight_are_the_layers_outputs(layer: nn.Module):
    """Catches columns in another order than the weight's, and places that do not belong to the outputs beside them."""
    x = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 8)
    y = layer(x)
    columns, outputs = sampled(layer, x, y, 7, torch.Generator().manual_seed(0))
    weight = layer.weight.flatten(1).unflatten(0, (len(columns), -1))
    bias = layer.bias.view(len(columns), 1, -1)
    assert torch.allclose(columns @ weight.mT + bias, outputs, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_last_layer_of_a_branch_corrects_its_shortcut(groups: int):
    """Catches targets of other channels, and a shortcut that is forgotten: its error would stay."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), Summed(groups), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    network = copy.deepcopy(dense)
    with torch.no_grad():
        network[0].weight[:3, 0] = 0
    repaired, plain, images = copy.deepcopy(network), copy.deepcopy(network), pixels(32, 5)
    repair(repaired, dense, pictures())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Walk, "shortcut", lambda walk, node: None)
        repair(plain, dense, pictures())
    with torch.no_grad():
        errors = [float((of[:2](images) - dense[:2](images)).square().mean()) for of in (plain, repaired)]
    assert errors[1] < errors[0] * (0.9 if groups == 1 else 1)  # a channel alone can make up for little


class Summed(nn.Module):
    def __init__(self, groups: int):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


# Two networks side by side


def test_a_walk_computes_what_the_networks_compute():
    """In-place layers included; a network that differs only behind a layer shares what stands before it."""
    dense, network = network_of(), network_of()
    with torch.no_grad():
        network[7].weight.mul_(0.5)
    images = [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)]
    walk, nodes = Walk(dense, network, images), []
    for node in walk:
        assert walk.inputs_differ(node) == (node.target in ("8", "9", "10", "11", "12")), node
        nodes.append(node)
    for which, of in ((DENSE, dense), (CHANGED, network)):
        outputs = walk.values(nodes[-1], which)
        assert all(torch.equal(output, of(images)) for output, images in zip(outputs, walk.batches, strict=True))
    assert [node for node in nodes if walk.known(node)] == nodes[-1:]  # what nobody reads any more is forgotten


def test_a_linear_layer_between_pictures_has_its_channels_last():
    """Catches rows of pixels that are taken for channels; of many places only as many are read as of a convolution."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 1), ChannelsLast(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)]
    dense = nn.Sequential(*layers, ChannelsFirst(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)).eval()
    network = copy.deepcopy(dense)
    method = pruning.create_method("block_l1", N=4, repair=True)
    method.attach(network)
    pruned = copy.deepcopy(network)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pruning.targets.POSITIONS", 1600)  # 10 of the 64 places of each picture
        assert {"2", "4"} <= method.calibrate(network, dense, pictures()).errors.keys()
    assert distance(network, dense) < 0.3 * distance(pruned, dense)


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["block_l1", "dense"])
def test_a_pruned_layer_of_several_groups_keeps_its_zeros(name: str):
    """Catches a fit that fills the zeros again: of a mask, and of a checkpoint that has none."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4)]
    dense = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    network = copy.deepcopy(dense)
    method = pruning.create_method(name, **({"N": 4, "repair": True} if name == "block_l1" else {}))
    with torch.no_grad():
        if name == "dense":
            network[4].weight[:, ::2] = 0
    method.attach(network, pictures())
    pruned, zeros = copy.deepcopy(network), network[4].weight == 0
    assert zeros.float().mean() == 0.5
    errors = method.calibrate(network, dense, pictures()).errors
    assert list(errors) == (["4"] if name == "dense" else ["2", "4"])
    assert torch.equal(network[4].weight == 0, zeros)
    assert distance(network[:5], dense[:5]) < 0.6 * distance(pruned[:5], dense[:5])


def test_what_the_activation_cuts_off_need_not_be_fitted():
    """Outputs behind a ReLU come closer, those before it do not have to; catches means that are no longer right."""
    dense, network = network_of(), network_of()
    with torch.no_grad():
        network[7].weight[:, ::2] = 0
        linear = copy.deepcopy(network)
    repair(network, dense, pictures())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pruning.targets.ACTIVATIONS", {})
        repair(linear, dense, pictures())
    images, errors = torch.cat([images for images, _ in pictures().batches()]), {}
    with torch.no_grad():
        for name, of in (("linear", linear), ("cut", network)):
            errors[name] = [float((of[:to](images) - dense[:to](images)).square().mean()) for to in (9, 10)]
    assert errors["cut"][1] < errors["linear"][1]
    assert errors["cut"][0] > errors["linear"][0]


def test_at_rate_zero_nothing_changes_bit_by_bit():
    dense = network_of()
    for options in ({"N": 4, "pr_target": 0.0}, {"N": 4, "rates": {"7": 0.5, "*": 0.0}}):
        network = network_of()
        method = pruning.create_method("block_l1", repair=True, **options)
        method.attach(network)
        method.calibrate(network, dense, pictures())
        pruning.finish(method, network, torch.randn(2, 3, 8, 8))
        after = network.state_dict()
        changed = {name for name, tensor in dense.state_dict().items() if not torch.equal(tensor, after[name])}
        assert changed == (set() if "pr_target" in options else {"7.weight", "8.running_mean", "12.weight", "12.bias"})


ONE_OF_EACH = [
    ("block_l1", {"N": 4}), ("block_l1", {"N": 4, "score": "l1"}), ("block_l1", {"N": 4, "rearrange": True}),
    ("block_l1", {"N": 4, "balanced": True}), ("block_l1", {"N": 3}), ("block_random", {"N": 4}), ("weight", {}),
    ("weight", {"score": "taylor"}), ("kernel_l1", {}), ("kernel_random", {}), ("filter", {"pr_target": 0.25}),
    ("imp", {"k": 0.5}), ("imp", {"k": 0.5, "layer_type": "channel"}), ("hydra", {"k": 0.5, "layer_type": "block"}),
    ("bip", {"k": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), ONE_OF_EACH, ids=str)
def test_every_mask_is_repaired(name: str, options: dict):
    """Outputs come closer to the dense network's, as many weights are zero, and those of a block still together."""
    own = {"repair": True} if "repair" in pruning.METHODS[name].own else {}
    dense, pruned, network = repaired(name, **options, **own)
    assert distance(network, dense) < 0.7 * distance(pruned, dense)
    for (layer, mine), theirs in zip(network.named_modules(), pruned.modules(), strict=True):
        if isinstance(mine, nn.Conv2d | nn.Linear) and layer:
            kept, before = (int((of.weight != 0).sum()) for of in (mine, theirs))
            assert abs(kept - before) <= (6 * 9 if options.get("N") == 3 else 0), layer  # blocks at the end are shorter


def test_prices_choose_better_than_magnitude():
    errors = {}
    for score in ("l1", "obs"):
        network, method = network_of(), pruning.create_method("block_l1", N=4, pr_target=0.6, repair=True, score=score)
        method.attach(network)
        errors[score] = method.calibrate(network, network_of(), pictures()).errors["3.conv1"]  # the first: alike inputs
    assert errors["obs"] < errors["l1"]


def test_what_is_pruned_stays_zero_while_the_masked_network_computes():
    """Catches weights that a new mask drops, and that a layer keeps computing with until it is settled."""
    network = network_of()
    method = pruning.create_method("block_l1", N=4, repair=True)
    method.attach(network)
    method.calibrate(network, network_of(), pictures())
    assert all(not layer.weight[layer.mask == 0].any() for layer in masked_layers(network).values())


def test_the_norms_of_a_pruned_checkpoint_follow_and_its_zeros_stay():
    dense, network = network_of(), network_of()
    with torch.no_grad():
        network[7].weight[:, ::2] = 0
    zeros = network[7].weight == 0
    result = pruning.create_method("dense").calibrate(network, dense, pictures())
    assert list(result.errors) == ["7"]
    assert torch.equal(network[7].weight == 0, zeros)
    images = torch.cat([batch for batch, _ in pictures().batches()])
    with torch.no_grad():
        before, now = ((of[:8](images).mean((0, 2, 3)) - of[8].running_mean) for of in (dense, network))
    spread = dense[8].running_var.sqrt()
    assert ((before - now) / spread).abs().max() < 0.3  # not all of it, since what a ReLU cuts off need not be right


def test_values_in_bfloat16_repair_as_well(monkeypatch):
    monkeypatch.setattr("pruning.repair.LARGE", 0)
    dense, _, half = repaired("block_l1", N=4, repair=True)
    monkeypatch.setattr("pruning.repair.LARGE", 2**24)
    dense, _, whole = repaired("block_l1", N=4, repair=True)
    assert distance(half, dense) < 1.1 * distance(whole, dense)


# What cannot serve is said in one line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "block_l1", "repair": False}, "prices are those of a repair, so only with --repair"),
        ({"name": "block_l1", "schedule": "cubic"}, "chosen once, so not with --schedule"),
        ({"name": "block_l1", "blocks": "reference"}, "share no rows, so not with --blocks reference"),
        ({"name": "block_l1", "budget": "global"}, "do not compare, so not with --budget global"),
        ({"name": "filter"}, "the price of a filter lies in the next layer"),
    ],
)
def test_prices_are_refused_where_they_cannot_serve(options: dict, says: str):
    with pytest.raises(ValueError, match=f"^--score obs: .*{says}"):
        pruning.create_method(**{"repair": True, "score": "obs"} | options)


def test_bad_input_is_said_in_one_line():
    network = network_of()
    method = pruning.create_method("block_l1", N=4, repair=True)
    method.attach(network)
    with pytest.raises(ValueError, match=r"^--repair: there is no calibration picture$"):
        method.calibrate(network, network_of(), Calibration(lambda: iter(()), F.cross_entropy))
    other = network_of()
    other[7] = nn.Conv2d(16, 16, 3)
    with pytest.raises(ValueError, match=r"^--repair: 7.weight is \(16, 16, 3, 3\) in the dense network, \(32, 16, 3"):
        method.calibrate(network, other, pictures())
    untraceable = nn.Sequential(Asks(), nn.Conv2d(3, 4, 1))
    with torch.no_grad():
        untraceable[1].weight[0] = 0
    with pytest.raises(ValueError, match=r"^cannot trace Sequential"):
        repair(untraceable, copy.deepcopy(untraceable), pictures())


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_layer_that_is_called_twice_stays():
    """Catches a fit for one place that would be wrong at the other."""
    dense = nn.Sequential(nn.Conv2d(3, 3, 1), Twice(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    network = copy.deepcopy(dense)
    with torch.no_grad():
        network[0].weight[0] = 0
        network[1].conv.weight[0] = 0
    before = network[1].conv.weight.clone()
    result = repair(network, dense, pictures())
    assert result.left_out == {"1.conv": "called more than once: it stays as it is"}
    assert list(result.errors) == ["0"]
    assert torch.equal(network[1].conv.weight, before)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


def test_layers_without_enough_positions_are_named():
    """With one picture of 8x8, the 3x3 convolutions of 16 inputs have 144 inputs a filter and at most 64 positions."""
    network = network_of()
    method = pruning.create_method("block_l1", N=4, repair=True)
    method.attach(network)
    result = method.calibrate(network, network_of(), pictures(1))
    assert result.left_out["7"] == "144 inputs of a filter, 16 positions: it keeps its dense weights"
    assert "12" in result.left_out
    assert list(result.errors) == ["3.conv1"]


# The road from a file to a file


@pytest.fixture(scope="module")
def dense_file(tmp_path_factory) -> Path:
    """A dense network of digits, trained for a few seconds."""
    job_dir = tmp_path_factory.mktemp("dense")
    imagenet.main([*DIGITS, "--method", "dense", "--num_epochs", "3", "--job_dir", str(job_dir)])
    return job_dir / "checkpoint" / "final.pt"


DIGITS = ["--arch", "small_runs:small_network", "--image_size", "8", "--train_batch_size", "64", "--lr", "0.1"]
BLOCKS = ["--method", "block_l1", "--N", "4", "--pr_target", "0.5", "--repair", "--calibration", "200"]


def top1(job_dir: Path) -> dict[str, float]:
    accuracy = json.loads((job_dir / "summary.json").read_text())["accuracy"]
    return {stage: figures["top1"] for stage, figures in accuracy.items()}


def test_a_run_repairs_and_reports_without_training(dense_file: Path, tmp_path: Path):
    words = [*DIGITS, *BLOCKS, "--pretrained_model", str(dense_file), "--num_epochs", "0"]
    imagenet.main([*words, "--job_dir", str(tmp_path)])
    found = top1(tmp_path)
    assert list(found) == ["dense", "pruned", "repaired", "tuned"]
    assert found["pruned"] + 20 < found["repaired"] == found["tuned"]
    layers = json.loads((tmp_path / "summary.json").read_text())["layers"]
    assert all(0 < layer["error"] < 1 for layer in layers if layer.get("rate"))
    assert "repaired, before training" in (tmp_path / "summary.md").read_text()
    assert "error after repair" in (tmp_path / "summary.md").read_text()

    again = tmp_path / "again"  # what another has pruned: its zeros stay, and the dense network is named
    words = [*DIGITS, "--method", "dense", "--repair", "--calibration", "400", "--num_epochs", "0"]
    words += ["--pretrained_model", str(tmp_path / "checkpoint" / "final.pt"), "--dense_model", str(dense_file)]
    imagenet.main([*words, "--job_dir", str(again)])
    zeros = [
        {name: tensor == 0 for name, tensor in torch.load(folder / "checkpoint" / "final.pt")["state_dict"].items()}
        for folder in (tmp_path, again)
    ]
    assert all(torch.equal(zeros[0][name], zeros[1][name]) for name in zeros[0] if name.endswith("weight"))
    assert top1(again)["dense"] == found["dense"]


def test_a_repaired_run_that_is_resumed_ends_the_same(dense_file: Path, tmp_path: Path, monkeypatch):
    """Catches a second repair on top of the weights of the first, and errors that the report loses."""
    rates = tmp_path / "rates.yml"
    rates.write_text("'3': 0.5\n'*': 0\n")
    words = [*DIGITS, *BLOCKS, "--rates", str(rates), "--pretrained_model", str(dense_file), "--resume"]
    words += ["--num_epochs", "2", "--debug"]
    imagenet.main([*words, "--job_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(callbacks.Save, "_stop_if_told", stop)
        imagenet.main([*words, "--job_dir", str(tmp_path / "halved")])
    imagenet.main([*words, "--job_dir", str(tmp_path / "halved")])
    whole, halved = (torch.load(tmp_path / name / "checkpoint" / "final.pt") for name in ("whole", "halved"))
    assert all(torch.equal(tensor, halved["state_dict"][name]) for name, tensor in whole["state_dict"].items())
    assert whole["errors"] == halved["errors"] != {}
    assert top1(tmp_path / "whole") == top1(tmp_path / "halved")


def stop(save: callbacks.Save, run, saved: bool = False) -> None:
    if saved:
        raise SystemExit(143)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--repair True: must be with --pretrained_model"),
        (["--method", "dense", "--pretrained_model", "FILE"], "--repair: --method dense keeps the zeros of"),
        (
            ["--method", "dense", "--pretrained_model", "FILE", "--dense_model", "FILE", "--num_epochs", "1"],
            "--num_epochs 1: --method dense would train the repaired zeros away",
        ),
        (["--data_set", "fake", "--pretrained_model", "FILE", "--num_epochs", "0"], "classes"),
        (["--no-repair", "--dense_model", "FILE"], "--dense_model FILE: must be with --repair"),
    ],
)
def test_what_a_run_cannot_repair_is_said_in_one_line(dense_file: Path, tmp_path: Path, words: list[str], says: str):
    words = [str(dense_file) if word == "FILE" else word for word in words]
    with pytest.raises(ValueError, match=re.escape(says.replace("FILE", str(dense_file)))) as error:
        imagenet.main([*DIGITS, "--repair", *words, "--job_dir", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_the_page_runs_as_it_stands():
    page = (Path(__file__).parent.parent / "docs" / "repair.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(code, "docs/repair.md", "exec"), names)
    assert names["result"].errors
