"""ResRep: the selection rule against the published procedure, lossless conversion, any network, what a run leaves."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from golden.fill import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import data
import imagenet
import models
import pruning
from pruning.method import relative_error
from pruning.resrep import Compactor, Costs, ResRep, find_targets, select
from structure import Graph, fuse_batch_norm
from utils.callbacks import Callback
from utils.count import count
from utils.export import export_onnx
from utils.run import Run, fit

CIFAR = ("resnet20", "resnet56", "resnet56_b", "vgg16_bn")


def filled(arch: str, num_classes: int = 10) -> nn.Module:
    network = models.create_model(arch, num_classes)
    network.load_state_dict({name: fill(name, tuple(t.shape)) for name, t in network.state_dict().items()})
    return network.eval()


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def widths(network: nn.Module) -> dict[str, int]:
    return {name: len(layer.weight) for name, layer in Graph(network).layers.items()}


# --- conversion -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def scramble(method: ResRep, network: nn.Module, share: float = 0.4) -> dict[str, int]:
    """Random compactors, with `share` of the rows below the threshold; returns how many rows live, by target."""
    generator, living = torch.Generator().manual_seed(0), {}
    for target in method.targets:
        dead = torch.rand(target.space.channels, generator=generator) < share
        dead[0] = False
        for compactor in target.compactors(network):
            noise = torch.randn(compactor.weight.shape, generator=generator)
            compactor.weight += noise / noise[0].numel() ** 0.5
            compactor.weight[dead] *= 1e-7
        living[target.name] = int((~dead).sum())
    return living


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "arch", ["resnet50", "resnet56", "resnet18", "vgg16_bn", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"]
)
def test_conversion_loses_channels_and_nothing_else(arch: str, tied: bool):
    network = filled(arch)
    size = 32 if arch in CIFAR else 64
    dense = widths(network)
    with torch.no_grad():
        expected = network(images(size))
        method = pruning.create_method("resrep", tied_groups=tied)
        method.attach(network)
        assert relative_error(network(images(size)), expected) < 1e-6, "compactors start as the identity"
        living = scramble(method, network)
    assert len(living) == len(method.targets) > 5
    kept = pruning.finish(method, network, images(size))
    narrow = widths(network)
    assert {name: narrow[name] for name in living} == living
    assert {name: layer.width for name, layer in kept.items() if name in dense} == {
        name: [dense[name], narrow[name]] for name in kept if name in dense
    }
    assert not any(isinstance(module, Compactor) for module in network.modules())
    assert not [layer.note for layer in kept.values() if layer.note]
    changed = {name for name in dense if dense[name] != narrow[name]}
    assert changed <= kept.keys() | {n for t in method.targets for n in t.space.producers}


def test_rounded_widths_keep_dead_channels():
    network = filled("resnet20")
    method = pruning.create_method("resrep", round_to=4)
    method.attach(network)
    living = scramble(method, network)
    pruning.finish(method, network, images())
    narrow = widths(network)
    assert {name: narrow[name] for name in living} == {name: -(-width // 4) * 4 for name, width in living.items()}


# --- published files --------------------------------------------------------------------------------------------------


def published(name: str) -> str:
    """Our name of a tensor of ResNet-56 or ResNet-50, as ResRep's files have it."""
    stem = "" if NETWORK == "resnet50" else "stage1."
    name = re.sub(r"^conv1\.", f"{stem}conv1.conv.", name)
    name = re.sub(r"^bn1\.", f"{stem}conv1.bn.", name)
    name = re.sub(r"compactor\.weight", "compactor.pwc.weight", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.bn(\d)\.compactor", r"stage\1.block\2.conv\3.compactor", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.conv(\d)", r"stage\1.block\2.conv\3.conv", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.bn(\d)", r"stage\1.block\2.conv\3.bn", name)
    name = re.sub(r"^layer(\d)\.0\.downsample\.0", r"stage\1.projection.conv", name)
    return re.sub(r"^layer(\d)\.0\.downsample\.1", r"stage\1.projection.bn", name)


NETWORK = "resnet56_b"


@pytest.fixture(scope="module")
def stages() -> tuple[nn.Module, dict, dict]:
    """A network with compactors, its tensors, and those of the converted network, which has no batch norm at all."""
    network = filled(NETWORK)
    method = pruning.create_method("resrep")
    method.attach(network)
    scramble(method, network)
    first = {published(name): tensor.clone() for name, tensor in network.state_dict().items()}
    narrow = copy.deepcopy(network)
    method = pruning.create_method("resrep")
    method.attach(reference := filled(NETWORK))
    reference.load_state_dict(network.state_dict())
    pruning.finish(method, reference, images())
    graph = Graph(reference)
    for name in graph.layers:
        if norm := graph.norm_after(name):
            layer, behind = graph.layers[name], graph.modules[norm]
            weight, bias = fuse_batch_norm(layer.weight, layer.bias, behind.state_dict(), behind.eps)
            layer.weight.data, layer.bias = weight.float(), nn.Parameter(bias.float())
            reference.set_submodule(norm, nn.Identity())
    second = {published(name): tensor for name, tensor in reference.state_dict().items()}
    return narrow, first, second


def write_hdf5(path: Path, tensors: dict, deps: list[int]) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, tensor in tensors.items():
            file.create_dataset(name, data=tensor.detach().numpy())
        file.create_dataset("deps", data=np.array(deps))
    return path


@pytest.mark.parametrize("form", ["pth", "hdf5"])
def test_published_files_with_compactors_load_and_shrink(stages, tmp_path, form: str):
    source, tensors, _ = stages
    assert "stage2.block3.conv1.compactor.pwc.weight" in tensors
    path = tmp_path / f"finish.{form}"
    if form == "pth":
        torch.save({"model": tensors, "optimizer": {}, "iteration": 375_000}, path)
    else:
        write_hdf5(path, tensors, [16] * 57)
    network = models.create_model(NETWORK, 10).eval()
    info = models.load_checkpoint(network, path)
    assert info["format"] == "resrep"
    assert info.get("iteration") == (375_000 if form == "pth" else None)
    with torch.no_grad():
        expected = source(images())
        assert relative_error(network(images()), expected) < 1e-4
        pruning.shrink(network)
        assert relative_error(network(images()), expected) < 1e-4
    assert network.layer2[3].conv1.out_channels == int((source.layer2[3].bn1.compactor.rows().norm(dim=1) > 1e-5).sum())


def test_published_converted_files_load(stages, tmp_path):
    source, _, tensors = stages
    assert {"stage2.block3.conv1.conv.weight", "stage2.block3.conv1.conv.bias"} <= tensors.keys()
    assert not any(".bn." in name for name in tensors)
    network = models.create_model(NETWORK, 10).eval()
    info = models.load_checkpoint(network, write_hdf5(tmp_path / "finish_converted.hdf5", tensors, [7, 8]))
    assert info["deps"] == [7, 8]
    with torch.no_grad():
        assert relative_error(network(images()), source(images())) < 1e-4
    (tmp_path / "half.hdf5").write_bytes((tmp_path / "finish_converted.hdf5").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half\.hdf5: truncated, or no flat file of tensors"):
        models.load_checkpoint(network, tmp_path / "half.hdf5")


def test_compactors_that_fit_nothing_are_unexpected(tmp_path):
    network = models.create_model("resnet20", 10)
    wrong = {"layer1.0.bn1.compactor.weight": torch.zeros(5, 5, 1, 1), "relu.compactor.weight": torch.zeros(4, 4, 1, 1)}
    torch.save(network.state_dict() | wrong, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"unexpected layer1\.0\.bn1\.compactor\.weight; unexpected relu\.compactor"):
        models.load_checkpoint(network, tmp_path / "wrong.pt")


# --- targets and costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "layers", "channels"), [("resnet50", 32, 7552), ("resnet56", 27, 1008), ("mobilenet_v1", 13, 5952)]
)
def test_published_targets(arch: str, layers: int, channels: int):
    targets = find_targets(Graph(models.create_model(arch)), tied_groups=False)
    assert len(targets) == layers
    assert sum(target.space.channels for target in targets) == channels


def test_tied_groups_share_their_masks():
    """A group of a residual stage has a compactor for each layer that adds to it, and one mask."""
    network = filled("resnet18")
    method = pruning.create_method("resrep", tied_groups=True)
    method.attach(network)
    sizes = {target.name: len(target.compactors(network)) for target in method.targets}
    assert sizes["layer1.1.conv2"] == 3  # the stem and two blocks
    assert sizes["layer2.1.conv2"] == 3  # two blocks and the projection
    assert sizes["layer1.0.conv1"] == 1
    assert sum(sizes.values()) == 20


def test_squeeze_excite_gates_have_no_compactor_and_depthwise_layers_a_diagonal_one():
    network = filled("mobilenet_v3_small")
    method = pruning.create_method("resrep")
    method.attach(network)
    hosts = {target.name: target.hosts for target in method.targets}
    assert hosts["features.4.conv.0"] == [
        ("features.4.conv.0", "features.4.conv.1"),
        ("features.4.conv.3", "features.4.conv.4"),
    ]
    assert hosts["features.2.conv.0"] == [("features.2.conv.0", "features.2.conv.1")]  # no squeeze-excite there
    assert network.features[4].conv[4].compactor.weight.shape == (96, 1, 1, 1)
    assert network.features[4].conv[1].compactor.weight.shape == (96, 96, 1, 1)


MACS = {"resnet50": (224, 4_089_184_256), "mobilenet_v1": (224, 568_740_352), "resnet56_b": (32, 125_747_840)}


@pytest.mark.parametrize("arch", MACS)
def test_costs_are_those_of_the_sliced_network(arch: str):
    size, total = MACS[arch]
    network = models.create_model(arch, 1000 if size > 32 else 10)
    method = pruning.create_method("resrep", tied_groups=True)
    method.attach(network)
    image = torch.zeros(1, 3, size, size)
    costs = Costs(network, method.targets, image)
    assert costs.total == total
    living = scramble(method, network)
    method.finish(network)
    assert costs([living[target.name] for target in method.targets]) == sum(
        c.macs for c in count(network, image).values()
    )


def published_macs(widths) -> np.ndarray:
    """Multiply-adds of ResNet-56 by the published formula, for the inner widths (..., 27) of its blocks."""
    widths = np.asarray(widths)
    total, inputs = 3 * 16 * 9 * 32**2 + 64 * 10, 16
    for block in range(27):
        outputs, pixels = ((16, 32**2), (32, 16**2), (64, 8**2))[block // 9]
        total = total + 9 * pixels * widths[..., block] * (inputs + outputs)
        if inputs != outputs:
            total += 2 * 2 * pixels * inputs * outputs  # a projection, taken for a 2x2 convolution
        inputs = outputs
    return total


PUBLISHED_MACS = 126_534_272


def test_costs_as_published():
    """Catches another count than the published one, also where it is taken of a network that is narrower already."""
    network, image = models.create_model("resnet56_b", 10), torch.zeros(1, 3, 32, 32)
    method = pruning.create_method("resrep", fidelity="reference")
    method.attach(network)
    costs = Costs(network, method.targets, image, published=True)
    assert costs.total == published_macs(costs.dense) == PUBLISHED_MACS
    living = scramble(method, network)
    method.finish(network)
    later = Costs(network, method.targets, image, published=True)
    widths = [living[target.name] for target in method.targets]
    assert later(widths) == costs(widths) == published_macs(widths)
    assert later.total == PUBLISHED_MACS


def test_every_selection_on_resnet56_is_the_published_one():
    """Catches a difference in cost, in who is looked at, and in masks that the published code leaves as they were."""
    network = models.create_model("resnet56_b", 10)
    asked = {"flops_target": 0.471, "before_mask_iters": 0, "mask_interval": 1, "begin_granularity": 60}
    method = pruning.create_method("resrep", fidelity="reference", lasso_strength=0.0, num_at_least=2, **asked)
    run = training_run(network, method)
    run.loader.epoch, run.iteration = 0, 0
    method.costs = Costs(network, method.targets, torch.zeros(1, 3, 32, 32), published=True)
    rng, masks = np.random.default_rng(0), [np.ones(width) for width in method.costs.dense]
    for _ in range(20):
        with torch.no_grad():
            for target in method.targets:
                (compactor,) = target.compactors(network)
                shrinking = rng.random(compactor.out_channels) * rng.choice([0.1, 1.0, 3.0])
                compactor.weight.copy_(torch.diag(torch.from_numpy(shrinking)).view_as(compactor.weight))
        run.iteration += 1
        norms = [norm.clone() for norm in method.norms(network)]
        method.after_update(run)
        masked = [(layer, int(channel)) for layer, mask in enumerate(masks) for channel in np.flatnonzero(mask == 0)]
        chosen = published_selection(norms, masked, published_macs, 0.471, 60, 2, literal=True)
        for layer in {layer for layer, _ in chosen}:
            masks[layer] = np.array([float((layer, channel) not in chosen) for channel in range(len(masks[layer]))])
        ours = method.masks(network)
        assert all(np.array_equal(mine.numpy(), theirs) for mine, theirs in zip(ours, masks, strict=True))
    assert published_macs([mask.sum() for mask in masks]) <= 0.471 * PUBLISHED_MACS, "the target was reached"


# --- selection --------------------------------------------------------------------------------------------------------


def published_selection(norms, masked, macs, target, granularity, at_least, literal):
    """The published procedure, step by step: a set of (layer, channel); `macs` maps widths to multiply-adds.

    The published code asks whether it has reached its limit only after it has taken a channel (`literal`).
    """
    origin = [len(norm) for norm in norms]
    entries = [(float(value), layer, channel) for layer, norm in enumerate(norms) for channel, value in enumerate(norm)]
    entries.sort(key=lambda entry: entry[0])
    current = list(origin)
    for layer, _ in masked:
        current[layer] -= 1
    limit = len(masked) + granularity if macs(current) > target * macs(origin) else float("inf")
    attempt, chosen = list(origin), set()
    for index, (_, layer, channel) in enumerate(entries):
        if macs(attempt) <= target * macs(origin) or (index >= limit and not literal):
            break
        if attempt[layer] <= at_least:
            continue
        attempt[layer] -= 1
        chosen.add((layer, channel))
        if literal and index + 1 >= limit:
            break
    return chosen


class ChainCosts:
    """Of layers in a row, the first reading three channels."""

    round_to = 1

    def __init__(self, dense):
        self.dense, self.total = np.array(dense), self(dense)

    def __call__(self, widths):
        widths = np.asarray(widths)
        return 3 * widths[..., 0] + (widths[..., :-1] * widths[..., 1:]).sum(-1)

    def share(self, widths):
        return self(widths) / self.total


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=5),
    st.floats(0.05, 1),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 12),
    st.booleans(),
    st.randoms(),
)
def test_selection_is_the_published_one(values, goal, granularity, at_least, already, literal, random):
    norms = [torch.tensor(layer).float() for layer in values]  # many ties
    costs = ChainCosts([len(norm) for norm in norms])
    places = [(layer, channel) for layer, norm in enumerate(norms) for channel in range(1, len(norm))]
    masked = random.sample(places, min(already, len(places)))
    counts = [sum(layer == number for layer, _ in masked) for number in range(len(norms))]
    masks = select(norms, counts, costs, goal, granularity, at_least, literal)
    chosen = {(layer, int(channel)) for layer, mask in enumerate(masks) for channel in (mask == 0).nonzero()}
    assert chosen == published_selection(norms, masked, costs, goal, granularity, at_least, literal)


def test_selection_by_hand():
    """Two layers of four in a row cost 3 * 4 + 4 * 4 = 28; the smallest go first, two more a round, until 14."""
    costs = ChainCosts([4, 4])
    norms = [torch.tensor([0.1, 5, 0.3, 5]), torch.tensor([0.2, 5, 5, 5])]
    rounds, counts = [], [0, 0]
    for _ in range(3):
        masks = select(norms, counts, costs, 0.5, 2, 1)
        counts = [int((mask == 0).sum()) for mask in masks]
        rounds.append([mask.tolist() for mask in masks])
    assert rounds[0] == [[0, 1, 1, 1], [0, 1, 1, 1]]  # 3 * 3 + 3 * 3 = 18
    assert rounds[1] == rounds[2] == [[0, 1, 0, 1], [0, 1, 1, 1]]  # 3 * 2 + 2 * 3 = 12
    norms[0][2], norms[0][3] = 5.0, 0.25  # one grows and comes back, another goes for it
    assert [mask.tolist() for mask in select(norms, counts, costs, 0.5, 2, 1)] == [[0, 1, 1, 0], [0, 1, 1, 1]]
    costs.round_to = 2  # widths of 3 cost as much as 4: the target takes more, and nothing goes in vain
    masks = select([torch.arange(4.0), torch.arange(4.0) + 2.5], [9, 9], costs, 0.5, 4, 1)
    assert [int(mask.sum()) for mask in masks] == [2, 4]


# --- training ---------------------------------------------------------------------------------------------------------


def test_gradients_are_reset_where_rows_are_to_be_forgotten_and_all_are_pulled():
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
    )
    network = nn.Sequential(nn.Conv2d(3, 3, 1), *network)
    method = pruning.create_method("resrep", lasso_strength=0.5)
    method.attach(network)
    compactor = network[2].compactor
    with torch.no_grad():
        compactor.weight.copy_(torch.tensor([[3.0, 4, 0], [0, 2, 0], [0, 0, 0]]).view(3, 3, 1, 1))
    compactor.mask[0] = 0
    compactor.weight.grad = torch.ones(3, 3, 1, 1)
    method.on_gradients(SimpleNamespace(network=network))
    expected = [[0.3, 0.4, 0], [1, 1.5, 1], [1, 1, 1]]  # an exactly zero row has no direction, and gives no NaN
    assert torch.allclose(compactor.weight.grad.flatten(1), torch.tensor(expected))


def test_optimisers_have_the_published_groups():
    network = filled("resnet20")
    method = pruning.create_method("resrep")
    method.attach(network)
    make = lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, weight_decay=1e-4)  # noqa: E731
    (optimizer,) = method.optimizers(network, make)
    names = {parameter: name for name, parameter in network.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[parameter]] = (group["momentum"], group["weight_decay"], group.get("lr_scale", 1))
    assert len(seen) == len(names)
    assert seen["layer1.0.conv1.weight"] == seen["linear.weight"] == (0.9, 1e-4, 1)
    assert seen["layer1.0.bn1.weight"] == (0.9, 0, 1)
    assert seen["layer1.0.bn1.bias"] == seen["linear.bias"] == (0.9, 0, 2)
    assert seen["layer1.0.bn1.compactor.weight"] == (0.99, 0, 1)


def test_adam_has_the_momentum_of_compactors_too():
    """Catches Adam's passing over `compactor_momentum`, and rows to forget that swing around zero for ever."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    network = nn.Sequential(*network, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    method = pruning.create_method("resrep", compactor_momentum=0.8, before_mask_iters=1000)
    run = training_run(network, method, lambda groups: torch.optim.Adam(groups, 0.05))
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = run.optimizers[0].param_groups
    betas = {names[parameter]: group["betas"] for group in groups for parameter in group["params"]}
    assert betas["4.compactor.weight"] == (0.8, 0.999)
    assert betas["0.weight"] == (0.9, 0.999)
    compactor = network[4].compactor
    compactor.mask[:3] = 0
    run.epochs = 15  # of four steps
    fit(run, [])
    norms = compactor.rows().norm(dim=1)
    assert not norms[:3].any()
    assert (norms[3:] > 0.1).all()


def test_mistakes_are_told():
    for option, value in (
        ("flops_target", 0.0),
        ("mask_interval", 0),
        ("compactor_momentum", 1.0),
        ("lasso_strength", -1),
    ):
        with pytest.raises(ValueError, match=f"--{option} {value}: "):
            pruning.create_method("resrep", **{option: value})
    with pytest.raises(ValueError, match="--round_to 8: not published, so not with --fidelity reference"):
        pruning.create_method("resrep", fidelity="reference", round_to=8)
    with pytest.raises(ValueError, match="Sequential has no layer whose channels ResRep could prune"):
        pruning.create_method("resrep").check(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)))


DIGITS = [
    "--arch",
    "resnet20",
    "--data_set",
    "digits",
    "--image_size",
    "16",
    "--train_batch_size",
    "64",
    "--lr",
    "0.05",
]
SCHEDULE = ["--method", "resrep", "--flops_target", "0.6", "--lasso_strength", "0.05", "--before_mask_iters", "10"]
SCHEDULE += ["--mask_interval", "1", "--begin_granularity", "10", "--mask_end", "0.4", "--lr_policy", "cos_step"]
SCHEDULE += ["--compactor_momentum", "0.9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    job_dir = tmp_path_factory.mktemp("resrep")
    imagenet.main([*DIGITS, *SCHEDULE, "--num_epochs", "7", "--job_dir", str(job_dir)])
    return job_dir


def test_a_run_reaches_the_target_and_its_files_load_back(trained: Path, capsys):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    curve = [line for line in lines if line["split"] == "train"]
    assert {"masked_channels", "macs_ratio", "norm_gap", "norm_remembered", "norm_forgotten"} <= curve[-1].keys()
    assert curve[-1]["macs_ratio"] <= 0.6
    summary = json.loads((trained / "summary.json").read_text())
    assert 0.5 < summary["totals"]["macs_kept"] / summary["totals"]["macs"] <= 0.6
    top1 = f"top-1 {summary['accuracy']['tuned']['top1']:.2f}"
    assert summary["accuracy"]["tuned"]["top1"] > 50
    for name in ("final.pt", "last.pt"):
        imagenet.main([*DIGITS, "--evaluate", str(trained / "checkpoint" / name)])
        assert top1 in capsys.readouterr().out


def sgd(groups) -> torch.optim.SGD:
    return torch.optim.SGD(groups, momentum=0.9)


def training_run(network: nn.Module, method: ResRep, make=sgd) -> Run:
    """Of two epochs of four steps on digits."""
    asked = {"data_path": None, "image_size": 32, "train_batch_size": 16, "eval_batch_size": 16, "seed": 0}
    pictures, _ = data.create_loaders("digits", **asked, device=torch.device("cpu"), workers=0, skip_bad=False)
    pictures.limit = 4
    method.check(network)
    method.attach(network)
    return Run(
        network,
        method,
        pictures,
        loss=lambda logits, labels, images: F.cross_entropy(logits, labels),
        epochs=2,
        rate=lambda *place: 0.05,
        make_optimizer=make,
    )


HASTE = {"flops_target": 0.6, "before_mask_iters": 0, "mask_interval": 1, "begin_granularity": 4}


def test_a_resumed_run_forgets_the_same_channels():
    def small() -> Run:
        torch.manual_seed(0)
        layers = [layer for i in (3, 8, 8) for layer in (nn.Conv2d(i, 8, 3), nn.BatchNorm2d(8), nn.ReLU())]
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        return training_run(network, pruning.create_method("resrep", lasso_strength=0.3, **HASTE))

    class Keep(Callback):
        def after_step(self, run: Run) -> None:
            if run.iteration == 3:
                self.state = copy.deepcopy(run.state_dict())

    whole, resumed, keep = small(), small(), Keep()
    fit(whole, [keep])
    resumed.load_state_dict(keep.state)
    fit(resumed, [])
    ours, theirs = whole.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert 0 < sum(int((ours[name] == 0).sum()) for name in ours if name.endswith("compactor.mask")) < 16


def test_a_network_of_others_is_pruned_and_exported(tmp_path):
    """torchvision's MobileNetV3, squeeze-excite and all: attach, a few steps, finish, export."""
    network = torchvision.models.mobilenet_v3_small(num_classes=10)
    method = pruning.create_method("resrep", lasso_strength=1.0, **HASTE | {"begin_granularity": 400})  # in a step
    run = training_run(network, method)
    fit(run, [])
    total = method.costs.total
    network = run.kept_network()
    kept = pruning.finish(method, network, images(32))
    macs = sum(cost.macs for cost in count(network, images(32)[:1]).values())
    assert 0.5 < macs / total <= 0.6
    assert not [layer.note for layer in kept.values() if layer.note]
    assert export_onnx(network, images(32), tmp_path / "narrow.onnx") < 1e-4
