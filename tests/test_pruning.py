"""Masks against published values and by law; the graph; permutation; one contract that every method keeps."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden.fill import fill, golden_input, mask_digest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import small_network
from torch import nn

import models
import pruning
from pruning.budget import cut, global_counts
from pruning.groups import (
    BLOCKS,
    CHANNELS,
    FILTERS,
    KERNELS,
    WEIGHTS,
    Pattern,
    blocks_intact,
    group_means,
    group_sizes,
    spread,
)
from pruning.layers import masked_layers
from pruning.method import relative_error
from pruning.oneshot import PATTERNS, rearranged_layers
from pruning.options import row
from pruning.order import filter_order, gathering_order
from pruning.score import Calibration
from structure import Graph

GOLDEN = json.loads((Path(__file__).parent / "golden" / "masks_1xn.json").read_text())
CASES = [(arch, case) for arch, known in GOLDEN.items() for case in known["masks"]]


# As published: which layers are sorted (R), by index in walk order.
SORTED = {
    "mobilenet_v1": set(range(14)),
    "mobilenet_v2": {*range(1, 34, 2)},
    "mobilenet_v3_small": {3, 5, 7, 11, 15, 19, 23, 27, 31, 35, 39, 41},
    "mobilenet_v3_large": {1, 3, 5, 9, 13, 17, 19, 21, 23, 25, 29, 33, 37, 41, 45, 47},
}


def sine_weight(O: int, I: int) -> torch.Tensor:
    """An example: w[o, i] = sin(o * I + i + 1)."""
    return torch.arange(1, O * I + 1).sin().view(O, I, 1, 1)


def create(name: str, **options) -> pruning.Method:
    """The method called `name`, given those of `options` that it has."""
    return pruning.create_method(name, **{key: value for key, value in options.items() if key in row(name).own})


def mask_of(weight: torch.Tensor, name: str, **options) -> list[str]:
    """Rows of the mask that `name` gives a layer, as strings of 0 and 1."""
    mask = layer_of(weight, create(name, **options)).mask
    return ["".join(str(int(value)) for value in row) for row in mask.flatten(1)]


def layer_of(weight: torch.Tensor, method: pruning.Method) -> nn.Module:
    """A layer of that weight in a network that `method` is attached to: between a stem and a classifier."""
    O, I, k, _ = weight.shape
    layer = nn.Conv2d(I, O, k)
    layer.weight = nn.Parameter(weight.clone())
    network = nn.Sequential(nn.Conv2d(3, I, 1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(O, 64))
    method.attach(network)
    return network[1]


def filled(arch: str, num_classes: int = 1000) -> nn.Module:
    network = models.create_model(arch, num_classes)
    network.load_state_dict({name: fill(name, tuple(t.shape)) for name, t in network.state_dict().items()})
    return network.eval()


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# --- masks ------------------------------------------------------------------------------------------------------------


def test_blocks_by_hand():
    assert mask_of(sine_weight(8, 4), "block_l1", N=4) == ["1100"] * 4 + ["1001"] * 4
    rows = mask_of(sine_weight(8, 3), "block_l1", N=2, pr_target=0.4)
    assert rows == ["110"] * 4 + ["011"] * 4


def test_rearranged_blocks_by_hand():
    assert filter_order(sine_weight(8, 4)).tolist() == [6, 3, 2, 5, 7, 0, 4, 1]
    rows = mask_of(sine_weight(8, 4), "block_l1", rearrange=True, N=4)
    assert rows == ["1101", "1101", "0010", "0010", "1101", "0010", "0010", "1101"]
    assert mask_of(sine_weight(8, 3), "block_l1", rearrange=True, N=2, pr_target=0.4) == ["011"] * 8


def test_published_blocks_wrap_around():
    weight = sine_weight(6, 4)
    assert mask_of(weight, "block_l1", N=4, blocks="reference") == ["0101", "0101", "0001", "0001", "1011", "1011"]
    assert filter_order(weight).tolist() == [3, 2, 5, 0, 4, 1]
    rows = mask_of(weight, "block_l1", rearrange=True, N=4, blocks="reference")
    assert rows == ["0011", "1001", "0110", "0110", "1001", "0011"]


def test_aligned_blocks_end_short():
    numbers = spread(torch.arange(4), BLOCKS.of(4), torch.empty(6, 2, 1, 1))[:, :, 0, 0]
    assert numbers.T.tolist() == [[0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 3, 3]]


def test_weights_and_filters_by_hand():
    weight = sine_weight(8, 4)
    rows = mask_of(weight, "weight", pr_target=0.3)
    assert rows == ["1101", "1011", "0111", "1110", "1101", "1011", "0110", "1101"]
    rows = mask_of(weight, "filter", pr_target=0.3)
    assert [number for number, row in enumerate(rows) if row == "0000"] == [3, 6]


def test_ties_go_by_index():
    assert mask_of(torch.ones(4, 2, 1, 1), "block_l1", N=2, pr_target=0.5) == ["01"] * 4


@pytest.mark.parametrize(("arch", "case"), CASES)
def test_published_masks(arch: str, case: str):
    conv_type, N, rate, rearrange, full = case.split("|")
    known = GOLDEN[arch]["masks"][case]
    network = filled(arch)
    create(
        conv_type,
        N=int(N[1:]),
        pr_target=float(rate[1:]),
        rearrange=rearrange.endswith("True"),
        full=full.endswith("True"),
        blocks="reference",
    ).attach(network)
    state = network.state_dict()
    digests = {name: mask_digest(state[f"{name}.mask"]) for name in known["digests"]}
    assert digests == known["digests"]
    assert sum(int(layer.mask.sum()) for layer in masked_layers(network).values()) == known["kept"]
    with torch.no_grad():
        logits = network.eval()(golden_input()[:1])[0, :6]
    assert relative_error(logits, torch.tensor(known["logits"])) < 1e-4


def published_mask(weight: np.ndarray, N: int, rate: float, sort: bool) -> np.ndarray:
    """The published recipe, step by step, for weight (O, I, kh, kw); ties by index."""
    order = (
        np.argsort(np.abs(weight).reshape(len(weight), -1).sum(1), kind="stable") if sort else np.arange(len(weight))
    )
    A = np.abs(weight[order]).transpose(1, 0, 2, 3)
    B = A.reshape(-1, N * weight.shape[2] * weight.shape[3])
    pruned = np.argsort(B.sum(1), kind="stable")[: int(len(B) * rate)]
    kept = np.ones(len(B), np.float32)
    kept[pruned] = 0
    sorted_mask = kept.repeat(B.shape[1]).reshape(A.shape).transpose(1, 0, 2, 3)
    mask = np.empty_like(sorted_mask)
    mask[order] = sorted_mask
    return mask


ORACLE = [(arch, N) for arch in ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small") for N in (2, 4, 8, 16, 32)]
ORACLE += [("mobilenet_v3_large", 16), ("mobilenet_v3_large", 32), ("resnet50", 4)]
ORACLE += [pytest.param("resnet50", 32, marks=pytest.mark.slow)]


@pytest.mark.parametrize("rearrange", [False, True])
@pytest.mark.parametrize(("arch", "N"), ORACLE)
def test_masks_follow_the_published_recipe(arch: str, N: int, rearrange: bool):
    """All five networks; wrapping blocks and classifiers included."""
    network = filled(arch)
    options = {"N": N, "pr_target": 0.6, "rearrange": rearrange, "full": True, "blocks": "reference"}
    names = list(Graph(network).masked_layers())
    chosen = {names[number] for number in SORTED.get(arch, ())} if rearrange else set()
    if rearrange and arch == "resnet50":
        chosen = {name for name in names if not name.endswith("conv3")}
    weights = {name: dict(network.named_modules())[name].weight.detach().double().numpy() for name in names}
    pruning.create_method("block_l1", **options).attach(network)
    for name, layer in masked_layers(network).items():
        assert np.array_equal(layer.mask.numpy(), published_mask(weights[name], N, 0.6, name in chosen)), name


def test_random_blocks_hit_the_rate_and_published_ones_do_not():
    weight = torch.randn(64, 64, 1, 1)

    def sparsity(blocks):
        return 1 - sum(row.count("1") for row in mask_of(weight, "block_random", N=4, blocks=blocks)) / 64**2

    assert sparsity("aligned") == 0.5
    assert 0.33 < sparsity("reference") < 0.45  # 1 - exp(-1/2) = 0.39


shapes = st.tuples(st.integers(1, 20), st.integers(1, 9), st.sampled_from([1, 3]))
SOME_PATTERNS = [WEIGHTS, KERNELS, FILTERS, CHANNELS, Pattern("stripes", (1,)), *(BLOCKS.of(N) for N in (2, 3, 4, 8))]


@settings(max_examples=80, deadline=None)
@given(shapes, st.sampled_from(SOME_PATTERNS), st.booleans(), st.integers(0, 9))
def test_laws_of_groups(shape, pattern, wrap, seed):
    """Sizes add up to all weights; the mean of a group is that of its members, whatever lies how in memory."""
    O, I, k = shape
    pattern = pattern.of(pattern.N, wrapped=wrap and pattern.dims == (2,) and O * I % pattern.N == 0)
    weight = torch.randn(O, I, k, k, generator=torch.Generator().manual_seed(seed)).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = weight.contiguous(memory_format=layout)
        means, sizes = group_means(weight, pattern), group_sizes(weight, pattern)
        number = spread(torch.arange(len(means)), pattern, weight)
        assert torch.equal(number.flatten().bincount(), sizes.long())
        sums = torch.zeros_like(means).index_add_(0, number.flatten(), weight.flatten())
        assert torch.allclose(sums / sizes, means)


@settings(max_examples=80, deadline=None)
@given(shapes, st.sampled_from(sorted(PATTERNS)), st.integers(1, 8), st.floats(0, 0.99), st.integers(0, 9))
def test_laws_of_masks(shape, name, N, rate, seed):
    O, I, k = shape
    N = min(N, O)
    weight = torch.randn(O, I, k, k, generator=torch.Generator().manual_seed(seed))
    method = create(name, N=N, pr_target=rate, seed=seed)
    mask = layer_of(weight, method).mask
    pattern = PATTERNS[name].of(N if "block" in name else 1)
    kept = group_means(mask, pattern)
    assert torch.equal(spread(kept, pattern, mask), mask), "a group lives or dies as a whole"
    assert int(kept.sum()) == len(kept) - int(len(kept) * rate), "exactly as many go as asked"
    if not method.random:
        score = group_means(weight.abs().double(), pattern)
        if 0 < kept.sum() < len(kept):
            assert score[kept == 0].max() <= score[kept == 1].min(), "the smallest go"
        assert torch.equal(layer_of(weight * mask, method).mask, mask), "pruning twice changes nothing"
    half = layer_of(weight, create(name, N=N, pr_target=rate / 2, seed=seed)).mask
    assert (half >= mask).all(), "half the rate prunes a subset"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=4), st.data())
def test_the_cut_is_that_of_a_slow_walk_down_the_ranking(values, data):
    """With and without costs, with layers that keep some: walk from the lowest score and take what the goal allows."""
    least = data.draw(st.integers(0, 3))
    costs = [[data.draw(st.integers(1, 3)) for _ in layer] for layer in values]
    goal = data.draw(st.integers(0, 30))
    ranking = sorted((score, l, g) for l, layer in enumerate(values) for g, score in enumerate(layer))
    stay = {key[1:] for l in range(len(values)) for key in [r for r in ranking if r[1] == l][::-1][:least]}
    scores = [torch.tensor(layer).float() for layer in values]

    gone = cut(scores, goal, [torch.tensor(cost).double() for cost in costs], least)
    spent, expected = 0, set()
    for _, l, g in ranking:
        spent += costs[l][g] * ((l, g) not in stay)
        if spent <= goal and (l, g) not in stay:
            expected.add((l, g))
    assert {(l, g) for l, goes in enumerate(gone) for g in goes.nonzero().flatten().tolist()} == expected

    free = [key[1:] for key in ranking if key[1:] not in stay]
    count = min(goal, len(free))
    gone = cut(scores, count, least=least)
    assert {(l, g) for l, goes in enumerate(gone) for g in goes.nonzero().flatten().tolist()} == set(free[:count])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 6), st.sampled_from([1, 2, 4, 8]), st.integers(0, 9))
def test_gathering_makes_scattered_blocks_rows(O, I, N, seed):
    N = min(N, O)
    weight = torch.randn(O, I, 1, 1, generator=torch.Generator().manual_seed(seed))
    method = pruning.create_method("block_l1", N=N, pr_target=0.5, rearrange=True)
    pruned = layer_of(weight, method).weight
    order = gathering_order(pruned, N)
    assert sorted(order.tolist()) == list(range(O))
    if O % N == 0:
        assert blocks_intact(pruned[order], N)


# --- budgets, schedules, orders ---------------------------------------------------------------------------------------


def test_balanced_blocks_cost_every_group_of_rows_the_same():
    weight = torch.randn(16, 10, 1, 1)
    mask = layer_of(weight, pruning.create_method("block_l1", N=4, pr_target=0.35, balanced=True)).mask
    blocks = mask[::4, :, 0, 0]
    assert blocks.sum(1).tolist() == [7] * 4
    for first, mask in zip(range(0, 16, 4), blocks, strict=True):  # and the smallest go in each
        size = weight[first : first + 4].abs().sum((0, 2, 3))
        assert size[mask == 0].max() <= size[mask == 1].min()


def test_a_global_budget_by_hand():
    """Relative to its layer's mean, a: .5 1 1.5, b: .2 1.8, so a third of ten weights takes b's first and a's first."""
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 90.0])]
    sizes = [torch.tensor([2, 2, 2]), torch.tensor([2, 2])]
    assert global_counts(scores, sizes, 0.4, 0.9) == [1, 1]
    assert global_counts(scores, sizes, 0.2, 0.9) == [0, 1]
    with pytest.raises(ValueError, match=r"--max_rate 0\.1: too low for --pr_target 0\.5"):
        global_counts(scores, sizes, 0.5, 0.1)


def test_a_global_budget_hits_the_share_of_all_weights_under_its_cap():
    network = filled("mobilenet_v2", 10)
    method = pruning.create_method("block_l1", N=4, pr_target=0.6, budget="global", max_rate=0.7)
    method.attach(network)
    masks = {name: layer.mask for name, layer in masked_layers(network).items() if name != "classifier.1"}
    pruned = sum(int((mask == 0).sum()) for mask in masks.values())
    weights = sum(mask.numel() for mask in masks.values())
    assert 0 <= 0.6 * weights - pruned < 100
    shares = [1 - float(mask.mean()) for mask in masks.values()]
    assert max(shares) <= 0.7
    assert max(shares) - min(shares) > 0.02
    assert network.classifier[1].mask.all()


def test_rates_by_layer(tmp_path):
    table = tmp_path / "rates.yml"
    table.write_text("linear: 0.25\nlayer1.*: 0\n'*.conv1': 0.75\n")
    network = filled("resnet20", 10)
    method = pruning.create_method("weight", pr_target=0.5, rates=table)
    method.attach(network)
    rates = {name: layer.rate for name, layer in method.finish(network).items()}
    assert (rates["linear"], rates["layer1.0.conv1"], rates["layer2.0.conv1"]) == (0.25, 0.0, 0.75)
    assert rates["layer3.2.conv2"] == 0.5
    for content, message in (("nothing: 0.5", "matches no layer"), ("linear: 2", "not a rate"), ("- 1", "a mapping")):
        table.write_text(content)
        with pytest.raises(ValueError, match=message):
            pruning.create_method("weight", rates=table).check(network)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.integers(1, 12), st.sampled_from([2, 3, 4]), st.floats(0.1, 0.9), st.integers(0, 99))
def test_clustering_keeps_no_less_than_sorting(O, I, N, rate, seed):
    N = min(N, O)
    weight = torch.randn(O, I, 1, 1, generator=torch.Generator().manual_seed(seed))
    method = pruning.create_method("block_l1", N=N, pr_target=rate, rearrange=True, rearrange_by="cluster")
    layer = layer_of(weight, method)
    told = layer.plan.kept_l1
    assert told["cluster"] >= told["sort"] - 1e-4
    assert told["cluster"] == pytest.approx(float(layer.weight.detach().abs().sum() / weight.abs().sum()), abs=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_a_growing_rate_only_adds_zeros_and_ends_at_the_target(schedule: str):
    torch.manual_seed(0)
    network = filled("resnet20", 10)
    options = {"schedule": schedule, "schedule_every": 2, "schedule_end": 0.75, "rearrange": True}
    method = pruning.create_method("block_l1", N=4, pr_target=0.5, **options)
    method.attach(network)
    run = SimpleNamespace(network=network, iteration=0, progress=0.0, loader=range(20), epochs=1, batches_per_step=1)
    seen = [{name: layer.mask.clone() for name, layer in masked_layers(network).items()}]
    assert all(mask.all() for mask in seen[0].values())
    for step in range(1, 21):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        run.iteration, run.progress = step, step / 20
        method.after_update(run)
        seen.append({name: layer.mask.clone() for name, layer in masked_layers(network).items()})
        assert all((seen[-1][name] <= seen[-2][name]).all() for name in seen[-1])
    assert torch.equal(seen[15]["layer1.0.conv1"], seen[20]["layer1.0.conv1"]), "it is reached at schedule_end"
    assert float(seen[20]["layer1.0.conv1"].mean()) == 0.5
    assert 0.5 < float(seen[8]["layer1.0.conv1"].mean()) < 1


# --- structure --------------------------------------------------------------------------------------------------------

LAYERS = {"mobilenet_v1": 14, "mobilenet_v2": 35, "mobilenet_v3_small": 42, "mobilenet_v3_large": 48, "resnet50": 53}


@pytest.mark.parametrize("arch", LAYERS)
def test_published_walk(arch: str):
    graph = Graph(models.create_model(arch))
    names = list(graph.masked_layers())
    assert len(names) == LAYERS[arch]
    chosen = {number for number, name in enumerate(names) if name in rearranged_layers(graph)}
    wanted = SORTED.get(arch, {number for number, name in enumerate(names) if not name.endswith("conv3")})
    assert chosen == wanted


@pytest.mark.parametrize(
    ("arch", "head"),
    {
        "mobilenet_v1": {"classifier.0"},
        "mobilenet_v2": {"classifier.1"},
        "mobilenet_v3_large": {"classifier.0", "classifier.3"},
        "resnet50": {"fc"},
        "resnet20": {"linear"},
        "vgg16_bn": {"classifier"},
    }.items(),
)
def test_classifiers_are_found_by_structure(arch: str, head: set[str]):
    assert Graph(models.create_model(arch, 10)).head == head


def test_unknown_networks_sort_only_what_is_free():
    graph = Graph(models.create_model("resnet20", 10))
    assert rearranged_layers(graph) == {name for name in graph.layers if name.endswith("conv1") and "." in name}
    graph = Graph(models.create_model("vgg16_bn", 10))
    assert rearranged_layers(graph) == graph.masked_layers().keys() - {"classifier"}


class Shared(nn.Module):
    """One convolution used twice, a concatenation of batches, and control flow on shapes only."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.twice(self.twice(x))
        return self.last(torch.cat([x, y], 0)).mean((2, 3)).view(x.size(0), -1)


def test_what_is_not_understood_is_not_permuted():
    graph = Graph(Shared())
    assert graph.output["twice"].fixed
    assert "operator cat" in graph.output["stem"].fixed
    assert "the logits" in graph.output["last"].fixed
    assert graph.stem == {"stem"}


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Silent(nn.Module):
    def forward(self, x):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Branching(), r"^cannot trace Branching, line \d+ of \S+test_pruning.py \(return x if .*\): .*control flow$"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Branching())), r"^cannot trace Sequential, module 1\.0, line"),
        (nn.Sequential(Silent()), r"module 0, line \d+ .* \(raise NotImplementedError\): NotImplementedError$"),
    ],
    ids=["itself", "a module", "without a message"],
)
def test_networks_that_cannot_be_traced_are_refused_in_one_line(network: nn.Module, words: str):
    """The line told neither which of many modules it was, nor where in the code; and it needed a message."""
    with pytest.raises(ValueError, match=words) as error:
        Graph(network)
    assert "\n" not in str(error.value)


class Constants(nn.Module):
    """A blur and a matrix in float32 that do not belong to the network, so that its .double() leaves them."""

    def __init__(self):
        super().__init__()
        self.conv, self.blur = nn.Conv2d(3, 4, 3), torch.full((4, 1, 2, 2), 0.25)

    def forward(self, x):
        x = nn.functional.conv2d(self.conv(x), self.blur, groups=4)
        return x.mean((2, 3)) @ torch.eye(4).float()


def test_a_network_with_constants_in_float32_is_proven():
    """The proof is in float64, where a convolution with such a constant raised a RuntimeError at the end of a run."""
    method, network = pruning.create_method("weight", pr_target=0.5, full=True), Constants()
    layer = nn.Sequential(network, nn.Linear(4, 2))
    method.attach(layer)
    assert pruning.finish(method, layer, torch.randn(2, 3, 6, 6)).keys() == {"1"}
    assert layer(torch.randn(2, 3, 6, 6)).dtype == network.blur.dtype == torch.float32


# --- blocks become rows -----------------------------------------------------------------------------------------------

NETWORKS = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "resnet50", "resnet20", "vgg16_bn")


@pytest.mark.parametrize("arch", NETWORKS)
def test_rearranged_blocks_become_rows_and_the_function_stays(arch: str):
    network = filled(arch, 16)
    size = 32 if arch in ("resnet20", "vgg16_bn") else 64
    method = pruning.create_method("block_l1", N=4, pr_target=0.5, rearrange=True)
    method.attach(network)
    kept = pruning.finish(method, network, images(size))
    lengths = {name: layer.N for name, layer in kept.items() if layer.in_blocks}
    changed = copy.deepcopy(network)
    fixed = pruning.gather_blocks(changed, lengths)
    found = pruning.find_blocks(changed, 4)
    assert {name for name, (_, how) in found.items() if how != "1x4, intact"} == fixed.keys()
    with torch.no_grad():
        assert relative_error(changed(images(size)), network(images(size))) < 1e-4
    layers = dict(changed.named_modules())
    scattered = {name for name, N in lengths.items() if not blocks_intact(layers[name].weight, N)}
    assert scattered == fixed.keys(), "what is not consecutive is said"
    if arch == "resnet50":
        assert scattered == {name for name in lengths if "downsample" in name}
    elif "v3" in arch:
        assert all(".fc.2" in name for name in scattered)
    else:
        assert not scattered


def test_training_moves_kept_weights_as_masked_forward_would():
    """Holding zeros in the weight equals `mask * weight` in the forward pass, momentum and decay included."""
    torch.manual_seed(0)
    layer = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    naive = copy.deepcopy(layer)
    method = pruning.create_method("block_l1", N=2, pr_target=0.5)
    method.attach(layer)
    mask = layer[1].mask

    run = SimpleNamespace(network=layer)
    ours = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    theirs = torch.optim.SGD(naive.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(5):
        x = torch.randn(4, 3, 8, 8)
        ours.zero_grad()
        layer(x).square().sum().backward()
        ours.step()
        method.after_update(run)
        theirs.zero_grad()
        hidden = nn.functional.conv2d(naive[0](x), naive[1].weight * mask, naive[1].bias)
        naive[4](hidden.mean((2, 3))).square().sum().backward()
        theirs.step()
        assert torch.allclose(layer[1].weight, naive[1].weight * mask, atol=1e-6), step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nonsense"}, "unknown method 'nonsense': one of dense"),
        ({"name": "block_l1", "pr_target": 1.0}, "--pr_target 1.0"),
        ({"name": "block_l1", "pr_target": -0.1}, "--pr_target -0.1"),
        ({"name": "block_l1", "N": 0}, "--N 0"),
        ({"name": "block_l1", "N": 5000}, "--N 5000: longer than the widest layer"),
        ({"name": "block_l1", "N": 7, "blocks": "reference"}, "--N 7: does not divide"),
        ({"name": "block_l1", "blocks": "round"}, "--blocks round: one of aligned, reference"),
        ({"name": "filter", "rearrange": True}, "--rearrange belongs to block_l1, block_random, not to filter"),
        ({"name": "weight", "balanced": True}, "--balanced belongs to block_l1, block_random, not to weight"),
        ({"name": "filter", "k": 99}, "--k belongs to bip, hydra, imp, not to filter"),
        ({"name": "block_random", "budget": "global"}, "--budget global: ranks by a score"),
        ({"name": "block_l1", "score": "taylor", "schedule": "cubic"}, "--score taylor: chosen once"),
        ({"name": "block_l1", "pr_target": float("nan")}, "--pr_target nan"),
        ({"name": "block_l1", "N": "4"}, "--N '4': not a whole number"),
        ({"name": "block_l1", "schedule": "square"}, "--schedule square: one of oneshot, linear, cubic"),
        ({"name": "block_l1", "schedule_end": 0}, "--schedule_end 0"),
        ({"name": "block_l1", "speed": 3}, "no pruning method has an option speed"),
    ],
)
def test_mistakes_are_told_in_the_users_words(options: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        pruning.create_method(**options).check(models.create_model("mobilenet_v2"))
    assert "\n" not in str(error.value)


# --- a score that looks at data ---------------------------------------------------------------------------------------


def test_a_score_of_gradients_is_that_of_a_slow_oracle_and_leaves_the_network_alone():
    """|weight x root mean square of its gradient| over the batches; running statistics and modes do not move."""
    torch.manual_seed(0)
    network = small_network().train()
    before = copy.deepcopy(network.state_dict())
    batches = [(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))) for _ in range(3)]
    calibration = Calibration(lambda: batches, nn.functional.cross_entropy)
    weight = network[3].weight
    squares, copied = torch.zeros_like(weight), copy.deepcopy(network).eval()
    for images, labels in batches:
        copied.zero_grad()
        nn.functional.cross_entropy(copied(images), labels).backward()
        squares += copied[3].weight.grad ** 2
    sizes = (weight.detach() * (squares / 3).sqrt()).abs().sum((2, 3))  # (O, I)
    blocks = sizes.unflatten(0, (-1, 4)).sum(1).T.flatten()  # input channel first
    pruning.create_method("block_l1", N=4, pr_target=0.5, score="taylor").attach(network, calibration)
    gone = (network[3].mask.flatten(2).sum(2).unflatten(0, (-1, 4)).sum(1).T.flatten() == 0).nonzero().flatten()
    assert gone.tolist() == sorted(blocks.argsort()[: len(blocks) // 2].tolist())
    assert network.training
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("weight"))
    with pytest.raises(ValueError, match="--score taylor: needs calibration pictures"):
        pruning.create_method("filter", score="taylor").attach(small_network())
