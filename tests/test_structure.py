"""The graph's channel spaces, merging, the inputs of layers; that looking at a network leaves it as it was."""

import pytest
import torch
from torch import nn

import models
import pruning
from structure import (
    Graph,
    constant_inputs,
    evaluating,
    fuse_batch_norm,
    fuse_pointwise,
    layer_inputs,
    norms_after_convolutions,
    permute,
    shrink,
)
from structure.operators import is_depthwise
from structure.slicing import replace
from utils.count import count


def modes(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


class Twice(nn.Module):
    """Calls one layer twice, works in place on what it read, and cannot be traced if `limit` is set."""

    def __init__(self, limit: float | None = None):
        super().__init__()
        self.conv, self.limit = nn.Conv2d(3, 3, 1), limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(self.conv(x))
        if self.limit is not None and x.sum() > self.limit:
            y = -y
        x.zero_()
        return y


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "look", [Graph, lambda n: constant_inputs(Graph(n)), lambda n: count(n, torch.zeros(1, 3, 32, 32))]
)
def test_looking_at_a_network_leaves_each_module_its_mode(look):
    """A frozen batch norm stays frozen and the rest in training, where a plain `train()` afterwards would not do."""
    network = models.create_model("resnet20", 10).train()
    network.bn1.eval()
    before, statistics = modes(network), network.layer1[0].bn1.running_mean.clone()
    look(network)
    assert modes(network) == before
    assert torch.equal(network.layer1[0].bn1.running_mean, statistics)


def test_modes_come_back_after_an_error():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(RuntimeError, match="channels"), evaluating(network):
        assert not any(modes(network))
        network(torch.zeros(1, 2, 4, 4))
    assert all(modes(network))


def test_a_network_is_traced_as_it_evaluates():
    """A branch for training only (stochastic depth, auxiliary heads) would fix channels, or hide layers."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(x * torch.bernoulli(torch.rand_like(x)) if self.training else x)

    network = Dropping().train()
    assert Graph(network).output["first"].fixed == set()


# --- norms and merging ------------------------------------------------------------------------------------------------


def test_norms_after_convolutions():
    network = models.create_model("mobilenet_v2", 10)
    norms = norms_after_convolutions(network)
    assert norms["features.0.1"] == "features.0.0"
    assert norms["features.2.conv.4"] == "features.2.conv.3", "depthwise convolutions count, too"
    assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert norms_after_convolutions(Twice(limit=0.0)) == {}, "it cannot be traced"
    assert "bn1" not in norms_after_convolutions(models.create_model("wrn_28_1", 10)), "another layer reads its input"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "diagonal"), [(1, False), (1, True), (4, False)])
def test_merging_keeps_the_function(affine: bool, bias: bool, groups: int, diagonal: bool):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=bias).double().eval()
    norm = nn.BatchNorm2d(4, affine=affine).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    behind = nn.Conv2d(4, 4, 1, groups=4, bias=False) if diagonal or groups > 1 else nn.Conv2d(4, 6, 1, bias=False)
    behind.double()
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    merged = fuse_batch_norm(layer.weight, layer.bias, norm.state_dict(), norm.eps)
    with torch.no_grad():
        torch.testing.assert_close(nn.functional.conv2d(images, *merged, 1, 1, 1, groups), norm(layer(images)))
        merged = fuse_pointwise(*merged, behind.weight.flatten(1))
        torch.testing.assert_close(nn.functional.conv2d(images, *merged, 1, 1, 1, groups), behind(norm(layer(images))))
    assert {tensor.dtype for tensor in merged} == {torch.float64}


def test_grouped_convolutions_keep_their_groups_when_replaced():
    """Groups would become channels if every layer of several groups passed for a depthwise one."""
    grouped, depthwise = nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8)
    replace(grouped, {"weight": grouped.weight[:4, :1], "bias": grouped.bias[:4]})
    replace(depthwise, {"weight": depthwise.weight[:5], "bias": depthwise.bias[:5]})
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (4, 4, 4)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (5, 5, 5)
    assert grouped(torch.zeros(1, 4, 3, 3)).shape == (1, 4, 1, 1)
    assert depthwise(torch.zeros(1, 5, 3, 3)).shape == (1, 5, 1, 1)


# --- the inputs of layers ---------------------------------------------------------------------------------------------


def test_layer_inputs_are_what_the_layers_read():
    network = models.create_model("resnet20", 10).train()
    batches = [torch.randn(n, 3, 32, 32) for n in (2, 3)]
    seen = list(layer_inputs(network, ["conv1", "bn1", "linear"], iter(batches)))
    assert all(modes(network))
    assert not any(module._forward_pre_hooks for module in network.modules())
    for images, inputs in zip(batches, seen, strict=True):
        assert inputs.keys() == {"conv1", "bn1", "linear"}
        assert torch.equal(inputs["conv1"][0], images)
        with torch.no_grad(), evaluating(network):
            assert torch.equal(inputs["bn1"][0], network.conv1(images))
            assert torch.equal(network.linear(inputs["linear"][0]), network(images))


def test_layer_inputs_of_every_call_before_they_are_overwritten():
    network, images = Twice(), torch.randn(2, 3, 4, 4)
    expected = [images.clone(), network.conv(images)]
    [inputs] = layer_inputs(network, ["conv"], [images])
    assert all(torch.equal(*pair) for pair in zip(inputs["conv"], expected, strict=True))
    assert not inputs["conv"][1].requires_grad


def test_layer_inputs_takes_one_batch_at_a_time_and_keeps_only_what_is_asked():
    taken = []

    def batches():
        for number in range(3):
            taken.append(number)
            yield torch.ones(1, 3, 4, 4)

    rounds = layer_inputs(Twice(), ["conv"], batches(), keep=lambda x: float(x.sum()))
    assert taken == []
    assert next(rounds)["conv"][0] == 48
    assert taken == [0]
    with pytest.raises(ValueError, match=r"^fc: Twice has no such layer$"):
        layer_inputs(Twice(), ["fc"], batches())


# --- channels side by side --------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Two convolutions whose channels stand side by side; `mix` makes of them what the last one reads."""

    def __init__(self, mix, width: int = 10):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.last = nn.Conv2d(width, 5, 1)
        self.mix = mix
        self.norm.running_mean.normal_(0, 0.1)
        self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mix(self.norm(torch.cat([self.a(x), self.b(x)], 1)))).mean((2, 3))


def shuffled(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], 2, 5, 8, 8).transpose(1, 2).reshape(x.shape[0], 10, 8, 8)


OTHER = "a sum or product of other parts"
SIDE_BY_SIDE = {  # what follows the concatenation: width that is read, why orders of a and b must stay, and numbers
    "nothing": (lambda x: x, 10, set(), set()),
    "resize": (lambda x: nn.functional.interpolate(x, scale_factor=2.0), 10, set(), set()),
    "pad": (lambda x: nn.functional.pad(x, (1, 2, 0, 1)), 10, set(), set()),
    "twice": (lambda x: torch.cat([x, x], 1), 20, set(), set()),
    "split at the seam": (lambda x: torch.cat(x.split([4, 6], 1)[::-1], 1), 10, set(), {"a split"}),
    "one piece": (lambda x: x.split([4, 6], dim=1)[1], 6, set(), {"a split"}),
    "slices": (lambda x: x[:, 4:] * x[:, :1], 6, {"a split", "a broadcast over channels"}, {"a split"}),
    "chunk elsewhere": (lambda x: torch.cat(x.chunk(2, 1)[::-1], dim=1), 10, {"a split"}, {"a split"}),
    "shuffle": (shuffled, 10, {"operator view"}, set()),
    "added halves": (
        lambda x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1],
        5,
        {"a split", "a residual sum", OTHER},
        {"a split"},
    ),
}


@pytest.mark.parametrize("kind", SIDE_BY_SIDE)
def test_channels_side_by_side(kind: str):
    """What is free is permuted and sliced with the function kept; what is not is refused. Catches a wrong offset."""
    mix, width, fixed, sized = SIDE_BY_SIDE[kind]
    torch.manual_seed(0)
    network, images = Parts(mix, width).eval(), torch.randn(2, 3, 8, 8)
    graph = Graph(network)
    spaces = [graph.output[name] for name in "ab"]
    assert set().union(*(space.fixed for space in spaces)) == fixed
    assert set().union(*(space.sized for space in spaces)) == sized
    with torch.no_grad():
        for layer in (network.a, network.b):
            layer.weight[1] = 0
        expected = network(images)
        told = permute(network, {"a": torch.tensor([2, 0, 3, 1]), "b": torch.tensor([5, 3, 1, 0, 2, 4])})
        assert told.keys() == {name for name, space in zip("ab", spaces, strict=True) if space.fixed}
        torch.testing.assert_close(network(images), expected)
        shrink(network)
        torch.testing.assert_close(network(images), expected)
    narrower = len(network.a.weight) < 4, len(network.b.weight) < 6
    padded = kind == "pad"  # a constant is none any more beside zeros
    assert narrower == tuple(not space.whole and not padded for space in spaces)


def test_a_sum_of_concatenations_ties_them_part_by_part():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, n, 1) for n in (4, 6, 4, 6))
            self.last = nn.Conv2d(10, 5, 1)

        def forward(self, x):
            x = torch.cat([self.a(x), self.b(x)], 1) + torch.cat([self.c(x), self.d(x)], 1)
            return self.last(x).mean((2, 3))

    graph = Graph(Sum())
    assert graph.output["a"] is graph.output["c"] is not graph.output["b"]
    assert graph.output["b"] is graph.output["d"]
    assert graph.input["last"] == (graph.output["a"], graph.output["b"])
    assert graph.output["a"].fixed == {"a residual sum"}


def test_grouped_convolutions_may_be_pruned_but_not_reordered():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3, groups=2), nn.AdaptiveAvgPool2d(1)
    )
    graph = Graph(network)
    assert graph.masked_layers().keys() == {"2"}, "a depthwise convolution mixes no channels"
    assert graph.output["0"].fixed == {"a grouped convolution"}
    method = pruning.create_method("block_l1", N=4, pr_target=0.5)
    method.attach(network)
    mask = network[2].mask.view(2, 6, 4, 9)
    assert network[2].plan.pattern.N == 2, "blocks of 4 would lie in two groups of 6"
    assert torch.equal(mask, mask[:, ::2, :, :1].repeat_interleave(2, 1).expand_as(mask))


@pytest.mark.parametrize("name", ["timm/tinynet_e", "torchvision/googlenet", "timm/dla46_c", "timm/hrnet_w18_small"])
def test_layers_hang_together_as_torch_pruning_says(name: str):
    """An oracle for which layers lose channels together: those whose filters go with the filters of one layer."""
    oracle = pytest.importorskip("torch_pruning")
    pytest.importorskip("timm")
    network = models.create_model(name, 10).eval()
    models.plainify(network)
    graph, images = Graph(network), torch.randn(1, 3, 64, 64)
    theirs = oracle.DependencyGraph().build_dependency(network, images)
    names = {module: key for key, module in network.named_modules()}
    compared = 0
    for key in list(graph.masked_layers())[:: max(len(graph.layers) // 12, 1)]:
        space = graph.output[key]
        if space.whole:
            continue
        prune = oracle.prune_conv_out_channels
        group = theirs.get_pruning_group(network.get_submodule(key), prune, [0])
        tied = {names[dep.target.module] for dep, _ in group if dep.handler == prune}
        assert {n for n in space.producers if not is_depthwise(graph.modules[n])} == {
            n for n in tied if not is_depthwise(graph.modules[n])
        }
        reads = (oracle.prune_conv_in_channels, oracle.prune_linear_in_channels)
        read = {names[dep.target.module] for dep, _ in group if dep.handler in reads}
        assert read == set(space.consumers)
        compared += 1
    assert compared > 3


def test_a_tensor_of_one_number_fixes_nothing():
    """Learnable scales and shifts of whole tensors, as HGNetV2 has them behind every convolution."""

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.scale, self.shift = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.last(self.scale * self.first(x) + self.shift).mean((2, 3))

    network, images = Affine().eval(), torch.randn(2, 3, 4, 4)
    assert Graph(network).output["first"].fixed == set()
    with torch.no_grad():
        network.first.weight[1] = 0
        expected = network(images)
        permute(network, {"first": torch.tensor([3, 1, 0, 2])})
        shrink(network)
        assert len(network.first.weight) == 3
        torch.testing.assert_close(network(images), expected)
