"""Narrower networks: what is sliced out changes no output, what cannot go is told, and narrow files load back."""

import copy

import pytest
import torch
from golden.fill import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import models
from pruning.method import relative_error
from structure import SUM, Graph, living_channels, remove_branches, slice_channels
from structure.operators import CARRY_CALLS, CARRY_MODULES

CIFAR = ("resnet20", "resnet56", "vgg16_bn")


def filled(arch: str, num_classes: int = 10) -> nn.Module:
    network = models.create_model(arch, num_classes)
    network.load_state_dict({name: fill(name, tuple(t.shape)) for name, t in network.state_dict().items()})
    return network.eval()


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def kill(network: nn.Module, share: float = 0.4, seed: int = 0) -> dict[str, int]:
    """Zero the same random channels of all layers of each sliceable space; returns how many live, by layer.

    A batch norm straight behind a killed filter gets no shift there, so that the channel is zero, not another constant.
    """
    generator, graph, living = torch.Generator().manual_seed(seed), Graph(network), {}
    for space in dict.fromkeys(graph.output.values()):
        if space.fixed - {SUM}:
            continue
        alive = torch.rand(space.channels, generator=generator) >= share
        alive[0] = True
        for name in space.producers:
            living[name] = int(alive.sum())
            for parameter in graph.layers[name].parameters():
                parameter[~alive] = 0
        for name in space.carriers:
            module = graph.modules[name]
            if isinstance(module, nn.BatchNorm2d):
                module.bias[~alive] = module.running_mean[~alive] = 0
    return living


def widths(network: nn.Module) -> dict[str, int]:
    return {name: len(layer.weight) for name, layer in Graph(network).layers.items()}


# --- slicing ----------------------------------------------------------------------------------------------------------

ARCHS = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "resnet18", "resnet50", *CIFAR)


@pytest.mark.parametrize("arch", ARCHS)
def test_dead_channels_leave_every_architecture_and_the_function_stays(arch: str):
    network = filled(arch)
    size = 32 if arch in CIFAR else 64
    before = widths(network)
    living = kill(network)
    with torch.no_grad():
        expected = network(images(size))
        assert slice_channels(network, living_channels(network)) == {}
        assert relative_error(network(images(size)), expected) < 1e-5
    assert widths(network) == before | living
    assert sum(living.values()) < 0.8 * sum(before[name] for name in living)
    again = copy.deepcopy(network)
    slice_channels(again, living_channels(again))
    assert widths(again) == widths(network)


def chain(*layers: nn.Module) -> nn.Module:
    """Layers in eval mode with random batch norms; random numbers are those of the default generator."""
    network = nn.Sequential(*layers).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return network


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Sigmoid, nn.GELU, nn.Identity)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from([(1, 0), (3, 0), (3, 1)]))
def test_constants_fold_into_the_next_layer_where_that_is_exact(seed, activation, depthwise, shape):
    """Dead filters before batch norm, activation and perhaps a depthwise layer: constants of any sign."""
    torch.manual_seed(seed)
    (kernel, padding), C = shape, 6
    through = [nn.Conv2d(C, C, 3, padding=1, groups=C), nn.BatchNorm2d(C), activation()] if depthwise else []
    reader = nn.Conv2d(C, 4, kernel, padding=padding, bias=seed % 2 == 0)
    behind = [nn.BatchNorm2d(4)] * (seed % 3 > 0)
    network = chain(
        nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), activation(), *through, reader, *behind, nn.AdaptiveAvgPool2d(1)
    )
    dead = torch.randperm(C)[: seed % (C - 1) + 1]
    with torch.no_grad():
        network[0].weight[dead] = 0
        network[0].bias[dead] = 0
        zero = network[:3](torch.zeros(1, 3, 3, 3))[0, :, 0, 0] == 0  # of a dead channel, behind the activation
        if depthwise:  # its own padding needs a zero; a depthwise channel of zero weights is the exception
            removable = [int(d) for d in dead if zero[d]]
            values = network[3:6](torch.zeros(1, C, 3, 3))[0, :, 0, 0]
            removable = [d for d in removable if not padding or values[d] == 0]
        else:
            removable = [int(d) for d in dead if zero[d] or not padding]
        expected = network(images(8))
        keep = torch.tensor(sorted(set(range(C)) - set(dead.tolist())))
        told = slice_channels(network, {"0": keep})
        assert relative_error(network(images(8)), expected) < 1e-5
    assert network[0].out_channels == C - len(removable)
    assert (told == {}) == (len(removable) == len(dead))
    if told:
        stay = len(dead) - len(removable)
        assert told == {"0": f"{stay} of {len(dead)} channels are no constants to fold away"}
    assert isinstance(network[1], nn.BatchNorm2d)
    assert network[1].num_features == C - len(removable)


def test_living_channels_are_never_removed():
    network = chain(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2 * 64, 5))
    expected = network(images(8))
    told = slice_channels(network, {"0": torch.tensor([1, 2]), "2": torch.tensor([0])})
    assert told == {f"{n}": f"{k} of {k} channels are no constants to fold away" for n, k in ((0, 2), (2, 1))}
    assert torch.equal(network(images(8)), expected)


def test_several_columns_a_channel_behind_a_flatten():
    torch.manual_seed(0)
    network = chain(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 64, 5))
    with torch.no_grad():
        network[0].weight[[1, 3]] = 0
        expected = network(images(8))
        assert slice_channels(network, {"0": torch.tensor([0, 2])}) == {}
        assert network[4].in_features == 128
        assert relative_error(network(images(8)), expected) < 1e-5


def test_what_nobody_reads_goes_and_one_channel_stays():
    torch.manual_seed(0)
    network = chain(nn.Conv2d(3, 4, 1), nn.Softmax2d(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1))
    assert living_channels(network) == {}, "an operator that is not known fixes channels"
    network[1] = nn.Sigmoid()
    with torch.no_grad():
        network[2].weight[:] = 0
        expected = network(images(8))
        slice_channels(network, living_channels(network))
        assert network[0].out_channels == 1
        assert torch.equal(network(images(8)), expected)


def test_fixed_spaces_are_told_and_mistakes_refused():
    network = filled("resnet20")
    told = slice_channels(network, {"linear": torch.arange(5), "conv1": torch.arange(4)})
    assert told == {"linear": "the logits", "conv1": "operator pad"}
    with pytest.raises(ValueError, match=r"nothing: no dense convolution or linear layer"):
        slice_channels(network, {"nothing": torch.arange(2)})
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1: no channel is kept"):
        slice_channels(network, {"layer1.0.conv1": torch.arange(0)})
    network = filled("resnet18")
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2 and conv1 share their channels, but are to keep different"):
        slice_channels(network, {"conv1": torch.arange(4), "layer1.0.conv2": torch.arange(5)})


def test_free_tensors_fix_the_channels_that_they_scale():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            return self.last(self.first(x) * self.scale).mean((2, 3))

    assert Graph(Scaled()).output["first"].fixed == {"the tensor scale"}


def test_unknown_values_stay_unknown_through_all_activations():
    """`minimum` and `clamp` might drop a NaN; then a channel that varies would pass for a constant."""
    unknown = torch.full((1, 40, 1, 1), torch.nan, dtype=torch.float64)
    pools = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    for module in CARRY_MODULES:
        if module not in pools:
            assert module().eval()(unknown.clone()).isnan().all(), module
    pools = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout, torch.clamp}
    for call in CARRY_CALLS - pools:
        if callable(call):
            assert call(unknown.clone()).isnan().all(), call
    assert torch.clamp(unknown, 0, 1).isnan().all()


# --- narrow files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow_file(tmp_path):
    """A narrow ResNet-18 that has a merged batch norm, too, and its file."""
    network = filled("resnet18")
    kill(network)
    slice_channels(network, living_channels(network))
    block = network.layer2[1]
    block.conv1.bias = nn.Parameter(torch.randn(block.conv1.out_channels))
    block.bn1 = nn.Identity()
    content = {"arch": "resnet18", "num_classes": 10, "state_dict": network.state_dict()}
    torch.save(content | {"widths": models.widths(network)}, tmp_path / "narrow.pt")
    return network, tmp_path / "narrow.pt"


def test_narrow_files_load_into_a_new_network(narrow_file):
    source, path = narrow_file
    network = models.create_model("resnet18", 10)
    info = models.load_checkpoint(network, path)
    assert info["widths"] == widths(network) == widths(source)
    with torch.no_grad():
        assert torch.equal(network.eval()(images()), source(images()))
    slice_channels(network, {"layer1.0.conv1": torch.arange(network.layer1[0].conv1.out_channels)})  # its numbers agree
    models.load_checkpoint(network, path)  # and once more into the narrow one
    assert widths(network) == widths(source)


@pytest.mark.parametrize("arch", ["mobilenet_v2", "mobilenet_v3_small", "vgg16_bn"])
def test_narrow_files_of_other_networks(tmp_path, arch: str):
    source = filled(arch)
    kill(source)
    slice_channels(source, living_channels(source))
    torch.save({"state_dict": source.state_dict(), "widths": models.widths(source)}, tmp_path / "narrow.pt")
    network = models.create_model(arch, 10).eval()
    models.load_checkpoint(network, tmp_path / "narrow.pt")
    with torch.no_grad():
        assert torch.equal(network(images()), source(images()))


def cut(state: dict, name: str, rows: int) -> dict:
    return state | {name: state[name][:rows]}


def test_files_that_are_wrongly_narrow_are_refused(narrow_file, tmp_path):
    _, path = narrow_file
    content = torch.load(path)
    state, told = content["state_dict"], content["widths"]
    width = told["layer1.0.conv1"]

    def refusal(**changes) -> str:
        network = models.create_model("resnet18", 10)
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        torch.save(content | changes, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match=r"wrong\.pt: does not fit resnet18: ") as error:
            models.load_checkpoint(network, tmp_path / "wrong.pt")
        after = network.state_dict()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        assert "\n" not in str(error.value)
        return str(error.value).split("resnet18: ", 1)[1]

    assert refusal(widths=None).startswith(f"conv1.weight is ({told['conv1']}, 3, 7, 7) in the file, (64, 3, 7, 7) in")
    other = refusal(widths=told | {"layer1.0.conv1": 1})
    assert other == f"layer1.0.conv1 is 1 wide by the file's list, {width} by its tensors"
    assert "its widths do not fit together" in refusal(
        state_dict=cut(state, "layer1.0.conv1.weight", width - 1), widths=told | {"layer1.0.conv1": width - 1}
    )
    few = cut(cut(state, "fc.weight", 4), "fc.bias", 4)
    assert refusal(state_dict=few, widths=told | {"fc": 4}) == "4 classes, not 10"
    wide = torch.cat([state["layer1.0.bn1.bias"]] * 4)
    assert "layer1.0.bn1.bias is" in refusal(state_dict=state | {"layer1.0.bn1.bias": wide})
    assert "layer1.0.bn2" in refusal(state_dict={k: t for k, t in state.items() if "layer1.0.bn2." not in k})


def test_a_branch_stays_whose_operators_read_its_shape():
    """Attention over pixels flattens them: a constant of one pixel in place of its first layer made it fail."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.weigh, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            weights = self.weigh(x).view(x.shape[0], 1, 36, 1).softmax(2)
            seen = x.view(x.shape[0], 1, 4, 36).matmul(weights).view(x.shape[0], 4, 1, 1)
            return (x + self.last(seen)).mean((2, 3))

    network = Attention().eval()
    network.last.weight.data.zero_()
    expected = network(images(8))
    assert remove_branches(network) == ["last"]
    assert torch.equal(network(images(8)), expected)
