"""Stripe-wise pruning: published values, one step by hand, the asked share, and what is left without the method."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden.fill import fill
from torch import nn

import data
import imagenet
import models
import pruning
from benchmarks.published_cost import published_cost
from pruning.method import relative_error
from pruning.order import order_by_shape
from pruning.stripe import Stripe, stripe_layers
from structure import Constant, Graph
from utils.count import beside, count, totals
from utils.loss import Loss
from utils.run import Run, fit

GOLDEN = json.loads((Path(__file__).parent / "golden" / "stripe.json").read_text())
IMAGES = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 32, 32)).astype(np.float32))


def create(**options) -> Stripe:
    return pruning.create_method("stripe", **options)


def attached(arch: str, num_classes: int = 10, **options) -> tuple[nn.Module, Stripe]:
    """A network in eval mode with golden weights and skeletons, and its method."""
    network = models.create_model(arch, num_classes)
    method = pruning.create_method("stripe", **{"sr": 1e-5, "threshold": 0.3} | options)
    method.check(network)
    method.attach(network)
    network.load_state_dict({name: fill(name, tuple(t.shape)) for name, t in network.state_dict().items()})
    return network.eval(), method


def kill(network: nn.Module, *layers: str) -> None:
    with torch.no_grad():
        for name in layers:
            network.get_submodule(name).FilterSkeleton.zero_()


@torch.no_grad()
def logits(network: nn.Module) -> torch.Tensor:
    return network.eval()(IMAGES)


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}


# --- published values -------------------------------------------------------------------------------------------------


def test_published_network_thresholded_and_broken():
    network, method = attached("vgg16_bn", threshold=GOLDEN["threshold"])
    assert relative_error(logits(network), torch.tensor(GOLDEN["skeleton_logits"])) < 1e-4
    method.settle(network)
    assert relative_error(logits(network), torch.tensor(GOLDEN["thresholded_logits"])) < 1e-4
    kept = pruning.finish(method, network, IMAGES)
    assert relative_error(logits(network), torch.tensor(GOLDEN["broken_logits"])) < 1e-4
    assert {name: int(np.sum(layer.positions)) for name, layer in kept.items()} == GOLDEN["stripes_kept"]
    assert {name: len(layer.weight) for name, layer in convolutions(network).items()} == GOLDEN["filters_alive"]
    assert (
        published_cost(network, IMAGES[:1], skeletons=True).parameters
        == GOLDEN["parameters_after_breaking_with_skeletons"]
    )


@pytest.mark.parametrize(
    ("arch", "flops", "parameters", "skeletons"),
    [("resnet56_projection", 252_585_226, 855_770, 18_384), ("vgg16_bn", 627_358_218, 14_724_042, 38_016)],
)
def test_published_accounting_of_dense_networks(arch: str, flops: int, parameters: int, skeletons: int):
    network = models.create_model(arch, 10)
    cost = published_cost(network, IMAGES[:1])
    assert (cost.flops, cost.parameters) == (flops, parameters)
    assert all(module.training for module in network.modules()), "counting leaves the network as it was"
    pruning.create_method("stripe").attach(network)
    assert sum(p.numel() for p in network.parameters()) == parameters + skeletons


def broken_as_published(network: nn.Module) -> dict[str, torch.Tensor]:
    """A pruned file as published, from a settled VGG or ResNet with skeletons; blocks may be gone."""
    state, alive_in = {}, torch.ones(3, dtype=torch.bool)
    modules = dict(network.named_modules())
    gone = [
        block
        for block, module in modules.items()
        if hasattr(module, "conv2")
        and any(not module.get_submodule(name).FilterSkeleton.any() for name in ("conv1", "conv2"))
    ]
    for name, module in modules.items():
        block = name.rpartition(".")[0]
        if block in gone or (tensors := module.state_dict(prefix=f"{name}.")) == {} or [*module.children()]:
            continue
        if isinstance(module, nn.Conv2d) and "downsample" not in name:
            skeleton, last = module.FilterSkeleton.data, name.rpartition(".")[2]
            weight = (module.weight * skeleton[:, None]).data
            if last != "conv1" or not block:  # what feeds it may have lost filters
                weight = weight[:, alive_in]
            alive_in = torch.ones(len(weight), dtype=torch.bool)
            if "features" in name or (last == "conv1" and block):
                alive_in = skeleton.flatten(1).any(1)
                weight, skeleton = weight[alive_in], skeleton[alive_in]
            rows = [
                weight[o, :, i, j]
                for i in range(3)
                for j in range(3)
                for o in range(len(weight))
                if skeleton[o, i, j] != 0
            ]
            tensors = {f"{name}.weight": torch.stack(rows)[:, :, None, None], f"{name}.FilterSkeleton": skeleton != 0}
        elif isinstance(module, nn.BatchNorm2d) and len(alive_in) == module.num_features and "downsample" not in name:
            tensors = {key: tensor[alive_in] if tensor.dim() else tensor for key, tensor in tensors.items()}
        elif isinstance(module, nn.Linear):
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, alive_in]
        parent = block.removesuffix(".downsample")
        state |= {k.replace(".downsample", "") if parent in gone else k: t.clone() for k, t in tensors.items()}
    return state


def test_published_pruned_file_of_vgg_loads(tmp_path):
    network, method = attached("vgg16_bn", threshold=GOLDEN["threshold"])
    method.settle(network)
    torch.save(broken_as_published(network), tmp_path / "pruned.pth.tar")
    loaded = models.create_model("vgg16_bn", 10)
    models.load_checkpoint(loaded, tmp_path / "pruned.pth.tar")
    assert relative_error(logits(loaded), torch.tensor(GOLDEN["broken_logits"])) < 1e-4


def test_published_pruned_file_of_resnet_with_removed_blocks_loads(tmp_path):
    network, method = attached("resnet56_projection")
    kill(network, "layer1.2.conv1", "layer2.0.conv2")
    method.settle(network)
    torch.save(broken_as_published(network), tmp_path / "pruned.pth.tar")
    loaded = models.create_model("resnet56_projection", 10)
    models.load_checkpoint(loaded, tmp_path / "pruned.pth.tar")
    network.layer1[2], network.layer2[0] = nn.Identity(), network.layer2[0].downsample  # as published, without ReLU
    assert relative_error(logits(loaded), logits(network)) < 1e-5


@pytest.mark.parametrize("arch", ["vgg16_bn", "resnet56_projection"])
def test_published_unpruned_file_loads_as_the_publication_prunes_it(arch: str, tmp_path):
    """Catches scales below the threshold that stay, filters and branches without stripes, and projections pruned."""
    network, method = attached(arch, threshold=GOLDEN["threshold"])
    if arch == "resnet56_projection":
        kill(network, "layer1.2.conv1", "layer2.0.conv2")
    torch.save(network.state_dict(), tmp_path / "best.pth.tar")
    loaded = models.create_model(arch, 10)
    with pytest.warns(UserWarning, match=r"stripes whose scale is 0\.3 or less are removed, as published"):
        models.load_checkpoint(loaded, tmp_path / "best.pth.tar", threshold=GOLDEN["threshold"])
    method.settle(network)
    assert relative_error(logits(loaded), logits(network)) < 1e-5
    cost = published_cost(loaded, IMAGES[:1], skeletons=True)
    if arch == "vgg16_bn":
        assert cost.parameters == GOLDEN["parameters_after_breaking_with_skeletons"]
        return
    torch.save(broken_as_published(network), tmp_path / "pruned.pth.tar")
    stored = torch.load(tmp_path / "pruned.pth.tar")
    counted = [t for key, t in stored.items() if "running" not in key and "tracked" not in key]
    assert cost.parameters == sum(tensor.numel() for tensor in counted), "what the publication's file holds"


def test_scales_of_our_own_files_are_only_folded(tmp_path):
    """Catches the publication's threshold where ours has decided already, or is another."""
    network, _ = attached("resnet56_projection")
    file = {"state_dict": network.state_dict(), "arch": network.arch, "widths": models.widths(network)}
    torch.save(file, tmp_path / "last.pt")
    loaded = models.create_model("resnet56_projection", 10)
    models.load_checkpoint(loaded, tmp_path / "last.pt")
    assert relative_error(logits(loaded), logits(network)) < 1e-5


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("features.9.FilterSkeleton", (8, 3, 3), "unexpected features.9.FilterSkeleton"),
        ("features.3.FilterSkeleton", (64,), "unexpected features.3.FilterSkeleton"),
        ("features.1.weight", (63,), r"features.1.weight is \(63,\) in the file, \(64,\) in the network"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], told: str, tmp_path):
    """Catches an error from inside where a line should say which tensor is wrong."""
    network, _ = attached("vgg16_bn")
    torch.save(network.state_dict() | {name: torch.ones(shape)}, tmp_path / "best.pth.tar")
    with pytest.raises(ValueError, match=told):
        models.load_checkpoint(models.create_model("vgg16_bn", 10), tmp_path / "best.pth.tar")


# --- breaking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "dead"),
    [
        ("vgg16_bn", ()),
        ("resnet56_projection", ("layer1.3.conv1", "layer2.0.conv2", "layer3.5.conv1")),
        ("mobilenet_v2", ("features.5.conv.0", "features.15.conv.0")),
        ("mobilenet_v3_small", ("features.5.conv.0",)),  # with squeeze-excite
        ("resnet50", ("layer2.1.conv2",)),
    ],
)
def test_broken_networks_compute_the_same_and_load_without_the_method(arch: str, dead: tuple[str, ...], tmp_path):
    network, method = attached(arch)
    kill(network, *dead)
    method.settle(network)
    whole = copy.deepcopy(network).double()
    kept = pruning.finish(method, network, IMAGES)  # agree within 1e-5, or it raises
    assert not stripe_layers(network)
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in whole.parameters())
    assert all(isinstance(network.get_submodule(name), Constant) for name in dead)
    assert all("the branch is removed" in kept[name].note for name in dead)

    costs = beside(count(whole.float(), IMAGES[:1]), count(network, IMAGES[:1]))
    assert all(costs[name].macs_kept == 0 for name in dead)
    assert totals(network, costs, whole)["parameters_kept"] <= sum(p.numel() for p in network.parameters())
    whole.double()

    file = {"state_dict": network.state_dict(), "arch": arch, "widths": models.widths(network)}
    torch.save(file, tmp_path / "final.pt")
    loaded = models.create_model(arch, 10)
    models.load_checkpoint(loaded, tmp_path / "final.pt")
    assert torch.equal(logits(loaded), logits(network))
    with torch.no_grad():
        assert relative_error(loaded.double()(IMAGES.double()), whole(IMAGES.double())) < 1e-4  # of float32 weights


def test_only_stripes_that_can_go_are_penalised():
    _, method = attached("resnet56_projection")
    assert len(method.sites) == 55, "not the two projections"
    assert {name for name, site in method.sites.items() if site.essential} == {"conv1"}
    assert {name.rpartition(".")[2] for name, site in method.sites.items() if site.norms} == {"conv1"}
    _, method = attached("vgg16_bn")
    assert all(site.essential and site.norms for site in method.sites.values())
    network, method = attached("mobilenet_v3_small")
    assert not any(".fc." in name or "classifier" in name for name in stripe_layers(network))
    assert all(layer.groups == 1 for layer in stripe_layers(network).values())


def test_paths_around_a_layer():
    graph = Graph(models.create_model("mobilenet_v2", 10))
    assert graph.bypassed("features.3.conv.0")
    assert not graph.bypassed("features.2.conv.0"), "this block changes the shape: no shortcut"


# --- training ---------------------------------------------------------------------------------------------------------


class Small(nn.Sequential):
    def __init__(self, width: int = 16):
        layers, inputs = [], 3
        for stride in (1, 2, 2):
            layers += [nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def test_one_step_by_hand():
    """Published order: subgradient of L1, no gradient for what is dead; the batch norm of a dead filter is zero."""
    torch.manual_seed(0)
    network = Small(4)
    method = create(sr=0.5, threshold=0.1)
    method.attach(network)
    skeleton, norm = network[3].FilterSkeleton, network[4]
    with torch.no_grad():
        skeleton[0] = 0.05
        skeleton[1, 0, 0] = -0.05
        skeleton[2, 2, 2] = -0.5
    method.settle(network)
    assert (skeleton == 0).sum() == 10
    assert norm.weight.tolist() == [0, 1, 1, 1]
    network(IMAGES).square().sum().backward()
    plain = skeleton.grad.clone()
    run = SimpleNamespace(network=network, progress=0.5)
    method.on_gradients(run)
    torch.testing.assert_close(skeleton.grad, (plain + 0.5 * skeleton.sign()) * (skeleton != 0))
    torch.optim.SGD(network.parameters(), 0.1).step()
    method.after_update(run)
    assert (skeleton[0] == 0).all()
    assert skeleton[1, 0, 0] == 0
    assert norm.weight[0] == norm.bias[0] == 0


def test_no_layer_that_everything_flows_through_dies():
    network, method = attached("vgg16_bn", threshold=0.99)
    kill(network, "features.3")
    with torch.no_grad():
        network.features[3].FilterSkeleton[5, 1, 1] = 1e-3
    method.settle(network)
    assert network.features[3].FilterSkeleton.nonzero().tolist() == [[5, 1, 1]]


def test_an_adapting_penalty_leaves_every_such_layer_a_share():
    network, method = attached("vgg16_bn", sr=None, threshold=0.99, pr_target=0.85, max_rate=0.9)
    with torch.no_grad():
        network.features[40].FilterSkeleton.mul_(1e-3)  # the first to go
    method.settle(network)
    shares = {
        name: float((layer.FilterSkeleton != 0).double().mean()) for name, layer in stripe_layers(network).items()
    }
    assert min(shares, key=shares.get) == "features.40"
    assert shares["features.40"] == pytest.approx(0.1, abs=1e-3)
    sizes = {name: layer.FilterSkeleton.numel() for name, layer in stripe_layers(network).items()}
    assert sum(shares[n] * sizes[n] for n in sizes) / sum(sizes.values()) == pytest.approx(0.15, abs=0.01)


def start(network: nn.Module, method: Stripe, epochs: int) -> Run:
    method.attach(network)
    request = {"data_path": None, "image_size": 8, "train_batch_size": 64, "eval_batch_size": 64, "seed": 0}
    request |= {"device": torch.device("cpu"), "workers": 0, "skip_bad": False, "use_dali": False, "say": print}
    loader, _ = data.create_loaders("digits", **request)
    rate, sgd = (lambda epoch, step, steps: 0.1), (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4))
    return Run(network, method, loader, Loss(), epochs, rate, sgd)


def test_a_resumed_run_goes_on_as_if_nothing_had_been():
    torch.manual_seed(0)
    network, states = Small(8), []
    again = copy.deepcopy(network)
    keep = SimpleNamespace(after_step=lambda run: None)
    keep.after_epoch = lambda run, results: states.append(copy.deepcopy(run.state_dict()))
    options = {"pr_target": 0.6, "pr_unit": "macs", "freeze_weights": 0.2}
    fit(start(network, create(**options), 2), [keep])
    run = start(again, create(**options), 2)
    run.load_state_dict(states[0])
    fit(run, [])
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert (again[3].FilterSkeleton == 0).any()


@pytest.mark.parametrize("unit", ["stripes", "macs"])
@pytest.mark.parametrize("target", [0.4, 0.7])
def test_the_asked_share_goes(unit: str, target: float):
    torch.manual_seed(0)
    network = Small()
    method = create(pr_target=target, pr_unit=unit)
    fit(start(network, method, epochs=8), [])
    image = torch.zeros(1, 3, 8, 8)
    dense = totals(network, {n: c for n, c in count(network, image).items() if n in method.sites})["macs"]
    stripes = [layer.FilterSkeleton != 0 for layer in stripe_layers(network).values()]
    kept = pruning.finish(method, network, image)
    left = totals(network, {n: c for n, c in count(network, image).items() if n in kept})["macs_kept"]
    gone = {"stripes": 1 - float(torch.cat([s.flatten() for s in stripes]).double().mean()), "macs": 1 - left / dense}
    assert gone[unit] == pytest.approx(target, abs=0.02)


def test_frozen_weights_stay_and_skeletons_move():
    torch.manual_seed(0)
    network = Small(8)
    method = create(sr=0.01, freeze_weights=1.0)
    run = start(network, method, epochs=1)
    before = copy.deepcopy(network)
    fit(run, [])
    for (name, now), then in zip(network.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) == ("FilterSkeleton" not in name), name


# --- shapes that become blocks ----------------------------------------------------------------------------------------


def test_filters_of_like_shape_become_neighbours():
    shapes = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert order_by_shape(shapes.view(5, 1, 1, 3).float()).tolist() == [0, 3, 1, 4, 2]  # what has no partner comes last
    alive = torch.rand(50, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    order = order_by_shape(alive.view(50, 1, 3, 3).float())
    assert sorted(order.tolist()) == list(range(50))
    for N in (2, 4, 8, 16):
        before, after = (sum(int(rows.any(0).sum()) for rows in a.split(N)) for a in (alive, alive[order]))
        assert after < before, N


def test_the_road_from_the_command_line(tmp_path, capsys):
    run = ["--arch", "resnet20", "--data_set", "digits", "--image_size", "16", "--train_batch_size", "128"]
    stripes = ["--method", "stripe", "--pr_target", "0.7", "--freeze_weights", "0.1", "--lr", "0.1"]
    imagenet.main([*run, *stripes, "--num_epochs", "2", "--export_onnx", "--job_dir", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["stripes_gone"] for line in records if line["split"] == "train"][-1] == pytest.approx(0.7, abs=0.02)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == "stripes, pr_target 0.7 of stripes, threshold 0.05, freeze_weights 0.1"
    assert (tmp_path / "shapes.png").read_bytes()[:4] == b"\x89PNG"
    tuned = summary["accuracy"]["tuned"]["top1"]
    capsys.readouterr()
    imagenet.main([*run, "--evaluate", str(tmp_path / "checkpoint" / "final.pt")])
    assert f"top-1 {tuned:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sr": -1.0}, "--sr -1.0: must be 0 or more"),
        ({"threshold": 0.0}, r"--threshold 0.0: must be in \(0, 1\)"),
        ({"pr_target": 1.0}, "--pr_target 1.0"),
        ({"pr_unit": "flops"}, "--pr_unit flops: one of stripes, macs"),
        ({"freeze_weights": 2.0}, "--freeze_weights 2.0: must be in"),
    ],
)
def test_mistakes_are_told_in_the_users_words(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        pruning.create_method("stripe", **options)
    with pytest.raises(ValueError, match="no convolution with a batch norm"):
        pruning.create_method("stripe").check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
