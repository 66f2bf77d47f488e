"""Networks have the published names, shapes and outputs; files fit by declared rules or are refused in one line."""

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from golden.fill import fill, golden_input
from torch import nn

import models

GOLDEN = Path(__file__).parent / "golden"
SHAPES = json.loads((GOLDEN / "state_dict_shapes_1xn.json").read_text())
LOGITS = {
    name: facts["dense_logits_first8"] for name, facts in json.loads((GOLDEN / "masks_1xn.json").read_text()).items()
}
VGG = json.loads((GOLDEN / "vgg_shapes.json").read_text())["VGG"]

PARAMETERS = {  # with 1000 classes; with 10 for the networks of CIFAR
    "mobilenet_v1": 4_237_928,
    "mobilenet_v2": 3_514_760,
    "mobilenet_v3_large": 5_490_200,
    "mobilenet_v3_small": 2_546_440,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    "resnet110": 1_727_962,
    "resnet56_b": 855_770,
    "resnet110_b": 1_730_714,
    "resnet56_projection": 855_770,
    "vgg11_bn": 9_228_362,
    "vgg13_bn": 9_413_066,
    "vgg16_bn": 14_762_058 - 38_016,  # without its filter skeletons
    "vgg19_bn": 20_035_018,
    "vgg11_bn_bip": 9_816_138,
    "vgg13_bn_bip": 10_000_842,
    "vgg16_bn_bip": 15_311_818,
    "wrn_28_1": 369_498,
    "wrn_28_4": 5_849_050,
    "wrn_28_10": 36_479_194,
    "wrn_40_2": 2_243_546,
}
CIFAR_DEPTHS = {f"resnet{depth}" for depth in (20, 32, 44, 56, 110)}
CIFAR = tuple(
    name
    for name in PARAMETERS
    if name.endswith(("_cifar", "_b", "_projection")) or name.startswith(("wrn_", "vgg")) or name in CIFAR_DEPTHS
)


def shapes(network):
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def filled(name, **options):
    """The network in eval mode with golden weights: no two tensors alike, batch-norm statistics far from 0 and 1."""
    network = models.create_model(name, **options).eval()
    network.load_state_dict({key: fill(key, tuple(tensor.shape)) for key, tensor in network.state_dict().items()})
    return network


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def save(tmp_path):
    def save(content, name="file.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def refusal(network, path):
    """The one line that says why the file is refused; the network must be untouched then."""
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="^" + re.escape(str(path))) as error:
        models.load_checkpoint(network, path)
    assert same(before, network.state_dict())
    assert error.value.__suppress_context__ or error.value.__context__ is None, (
        "torch's own error would be printed, too"
    )
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


# Networks


def test_every_name_builds_and_no_other():
    assert set(PARAMETERS) == set(models.NAMES)
    assert list(models.NAMES) == sorted(models.NAMES)
    with pytest.raises(
        ValueError,
        match=r"^unknown network 'vgg19': choose one of mobilenet_v1, .*wrn_40_2, or timm/NAME, .*:FUNCTION$",
    ):
        models.create_model("vgg19")
    with pytest.raises(ValueError, match="num_classes is 0"):
        models.create_model("resnet20", 0)


@pytest.mark.parametrize("name", SHAPES)
def test_published_names_and_shapes(name):
    published = {key: shape for key, shape in SHAPES[name].items() if not key.endswith(".mask")}
    assert shapes(models.create_model(name)) == published
    assert list(models.create_model(name).state_dict()) == list(published), "the layers stand in the published order"


def test_published_vgg():
    published = {key: shape for key, shape in VGG.items() if not key.endswith("FilterSkeleton")}
    assert shapes(models.create_model("vgg16_bn", 10)) == published


def test_published_names_of_bip():
    published = json.loads((GOLDEN / "bip.json").read_text())["resnet20s"]["shapes_unstructured"]
    published = {key: shape for key, shape in published.items() if not key.endswith("popup_scores")}
    published = {key.replace("fc.", "linear."): shape for key, shape in published.items()}
    network = models.create_model("resnet20s", 10)
    assert network.arch == "resnet20"
    assert shapes(network) == published
    assert same(network.state_dict(), models.create_model("resnet20", 10).state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvision_names_of_resnets(name):
    theirs = shapes(getattr(torchvision.models, name)())
    theirs["fc.weight"] += [1, 1]
    assert shapes(models.create_model(name)) == theirs


@pytest.mark.parametrize("name", models.NAMES)
def test_parameters_sizes_and_trace(name):
    network = models.create_model(name, 10 if name in CIFAR else 1000).eval()
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    traced = torch.fx.symbolic_trace(network)
    with torch.no_grad():
        for height, width in ((32, 32), (17, 50)):
            images = torch.randn(2, 3, height, width)
            logits = network(images)
            assert logits.shape == (2, network.num_classes)
            assert logits.isfinite().all()
            assert torch.equal(traced(images), logits)


@pytest.mark.parametrize("name", models.NAMES)
def test_seed(name):
    random_state = torch.get_rng_state()
    first, again, other = (models.create_model(name, 10, seed).state_dict() for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", [name for name in models.NAMES if name != "wrn_28_10"])  # like wrn_28_1, but slow
def test_a_new_network_learns(name):
    """It starts undecided (a loss of about log(10) = 2.3), and gradients reach its first convolution."""
    network, side = models.create_model(name, 10).train(), 32 if name in CIFAR else 64
    logits = network(torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0)))
    loss = nn.functional.cross_entropy(logits, torch.arange(4))
    loss.backward()
    assert 2 < loss.item() < 3
    assert 1e-6 < next(network.parameters()).grad.norm().item() < 1e6


@pytest.mark.parametrize("name", LOGITS)
def test_golden_logits(name):
    network = filled(name)
    with torch.no_grad():
        logits = network(golden_input())
    expected = torch.tensor(LOGITS[name])
    assert (logits[:, :8] - expected).abs().max() < 1e-4 * logits.abs().max()


def test_zero_padding_shortcut():
    padded = models.create_model("resnet20", 10).layer2[0].downsample(torch.ones(1, 16, 5, 5))
    assert padded.shape == (1, 32, 3, 3)
    assert padded.sum(dim=(0, 2, 3)).tolist() == [0] * 8 + [9] * 16 + [0] * 8


# Checkpoints that fit


@pytest.mark.parametrize("form", ["flat", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_containers_and_prefixes(save, form, prefix):
    source = filled("mobilenet_v3_small", num_classes=10)
    tensors = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    target = models.create_model("mobilenet_v3_small", 10)
    info = models.load_checkpoint(target, save(tensors if form == "flat" else {form: tensors}))
    assert info == {"format": form, "masks": {}, "extras": {}}
    assert same(source.state_dict(), target.state_dict())


def test_what_the_file_says_is_returned(save):
    source = filled("resnet20", num_classes=10)
    kept = {"layer1.0.conv1": [0, 3]}
    container = {"arch": "resnet20", "num_classes": 10, "state_dict": source.state_dict(), "kept": kept, "epoch": 3}
    container |= {"best_acc": torch.tensor(91.5), "optimizer": {"state": {}}}
    info = models.load_checkpoint(models.create_model("resnet20", 10), str(save(container)))
    facts = {"arch": "resnet20", "num_classes": 10, "kept": kept, "epoch": 3, "best_acc": 91.5}
    assert info == facts | {"format": "state_dict", "masks": {}, "extras": {}}


def test_trained_cifar_files(save):
    """{'state_dict': {'module.conv1.weight', ...}, 'best_prec1'}: no num_batches_tracked, a plain linear layer."""
    source = filled("resnet56", num_classes=10)
    tensors = {f"module.{k}": t for k, t in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert "module.layer3.8.conv2.weight" in tensors
    assert tensors["module.linear.weight"].shape == (10, 64)
    target = models.create_model("resnet56", 10).eval()
    info = models.load_checkpoint(target, save({"state_dict": tensors, "best_prec1": 93.62}))
    assert info == {"format": "state_dict", "masks": {}, "extras": {}, "best_prec1": 93.62}
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(target(images), source(images))


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large"])
def test_pretrained_mobilenets(save, name):
    """Linear weights are 2-D there, and no convolution has a bias."""
    source = filled(name, num_classes=10)
    tensors = source.state_dict()
    linear = [key for key in tensors if key.endswith(".weight") and ("classifier" in key or ".fc." in key)]
    biases = [key for key in tensors if re.search(r"conv\.\d\.bias|features\.\d+\.[03]\.bias|^conv\.0\.bias", key)]
    biases = [key for key in biases if key.replace(".bias", ".running_mean") not in tensors]
    for key in biases:
        tensors[key].zero_()
    assert len(biases) == {"mobilenet_v1": 13, "mobilenet_v2": 34, "mobilenet_v3_large": 30}[name]

    file = {k: t.flatten(1) if k in linear else t for k, t in tensors.items() if k not in biases}
    assert all(file[key].ndim == 2 for key in linear)
    target = models.create_model(name, 10)
    for key in biases:
        nn.init.ones_(target.get_parameter(key))
    models.load_checkpoint(target, save(file))
    assert same(target.state_dict(), tensors)


def test_linear_layers_from_1x1_convolutions(save):
    source = filled("vgg16_bn", num_classes=10)
    tensors = source.state_dict()
    target = models.create_model("vgg16_bn", 10)
    models.load_checkpoint(
        target, save(tensors | {"classifier.weight": tensors["classifier.weight"][:, :, None, None]})
    )
    assert same(target.state_dict(), tensors)


def test_masks_are_folded_and_returned(save):
    source = filled("mobilenet_v2", num_classes=10)
    tensors = source.state_dict()
    layers = [key.removesuffix(".mask") for key in SHAPES["mobilenet_v2"] if key.endswith(".mask")]
    assert len(layers) == 35
    masks = {layer: (torch.rand_like(tensors[f"{layer}.weight"]) < 0.5).float() for layer in layers}
    file = tensors | {f"{layer}.mask": mask for layer, mask in masks.items()}
    file["classifier.1.mask"] = file["classifier.1.mask"].flatten(1).bool()  # any type, seen as a linear layer's

    target = models.create_model("mobilenet_v2", 10)
    info = models.load_checkpoint(target, save({"state_dict": file}))
    assert info["masks"].keys() == masks.keys()
    for layer, mask in masks.items():
        assert torch.equal(info["masks"][layer].float(), mask)
        assert torch.equal(target.get_parameter(f"{layer}.weight"), tensors[f"{layer}.weight"] * mask)


def test_bip_files(save):
    """ResNet-18 in its CIFAR form, which has the name of the ImageNet form there, with scores; an unused group."""
    source = filled("resnet18_cifar", num_classes=10).state_dict()
    theirs = {name.replace("downsample", "shortcut").replace("fc.", "linear."): t for name, t in source.items()}
    theirs["linear.weight"] = theirs["linear.weight"].flatten(1)
    scores = {"layer2.0.shortcut.0.popup_scores": torch.randn(128, 64, 1, 1)}
    target = models.create_model("resnet18_cifar", 10)
    info = models.load_checkpoint(target, save({"arch": "resnet18", "state_dict": theirs | scores}))
    assert same(source, target.state_dict())
    assert info["format"] == "bip"
    assert list(info["extras"]) == ["layer2.0.downsample.0.popup_scores"]

    wide = filled("wrn_28_1", num_classes=10).state_dict()
    unused = {name.replace("block1", "sub_block1"): t for name, t in wide.items() if name.startswith("block1")}
    target = models.create_model("wrn_28_1", 10)
    models.load_checkpoint(target, save(wide | unused))
    assert same(wide, target.state_dict())


def test_our_files_of_a_network_under_its_other_name_still_load(save):
    """Files of runs with `--arch resnet20s` have `fc` in tensors, widths and kept layers; ours say `linear` now."""
    source = filled("resnet20", num_classes=10)
    state = {name.replace("linear.", "fc."): tensor for name, tensor in source.state_dict().items()}
    widths = {name.replace("linear", "fc"): width for name, width in models.widths(source).items()}
    content = {"arch": "resnet20s", "num_classes": 10, "widths": widths, "kept": {"fc": {"rate": 0.5}}}
    target = models.create_model("resnet20s", 10)
    info = models.load_checkpoint(target, save(content | {"state_dict": state}))
    assert same(source.state_dict(), target.state_dict())
    assert info["kept"] == {"linear": {"rate": 0.5}}
    assert info["widths"] == models.widths(source)
    said = refusal(models.create_model("resnet32", 10), save(content | {"state_dict": state}))
    assert said.startswith(
        "does not fit resnet32: the file's arch is resnet20, the network's resnet32; missing layer1.3"
    )
    both = refusal(target, save(state | source.state_dict()))
    assert both == "does not fit resnet20: unexpected fc.weight; unexpected fc.bias"


def test_a_written_file_says_what_loading_needs(tmp_path):
    source = filled("resnet20", num_classes=10)
    models.save_checkpoint(tmp_path / "final.pt", source, kept={"conv1": {"rate": 0.5}}, epoch=3)
    target = models.create_model("resnet20", 10)
    info = models.load_checkpoint(target, tmp_path / "final.pt")
    assert same(source.state_dict(), target.state_dict())
    assert info.pop("format") == "state_dict"
    facts = {"arch": "resnet20", "num_classes": 10, "widths": models.widths(source), "kept": {"conv1": {"rate": 0.5}}}
    assert info == facts | {"epoch": 3, "masks": {}, "extras": {}}


def test_a_format_is_a_row(save, monkeypatch):
    """A file of others is translated by its reader alone, and nothing else changes for it."""

    class Upper:
        @staticmethod
        def recognise(content, network):
            return all(name.isupper() for name in content.tensors)

        @staticmethod
        def read(content, network):
            return replace(content, tensors={name.lower(): tensor for name, tensor in content.tensors.items()})

    source, target = filled("resnet20", num_classes=10), models.create_model("resnet20", 10)
    path = save({name.upper(): tensor for name, tensor in source.state_dict().items()})
    assert "missing conv1.weight" in refusal(target, path)
    monkeypatch.setitem(models.formats.FORMATS, "upper", Upper)
    assert models.load_checkpoint(target, path)["format"] == "upper"
    assert same(source.state_dict(), target.state_dict())


def test_scales_that_fit_no_layer_are_unexpected(save):
    """They must not be left out, or the weights would be loaded without them."""
    state = models.create_model("resnet20", 10).state_dict()
    said = refusal(models.create_model("resnet20", 10), save(state | {"conv1.FilterSkeleton": torch.ones(2, 3, 3)}))
    assert said == "does not fit resnet20: unexpected conv1.FilterSkeleton"


def torchvision_network(name):
    """torchvision's network with weights and batch-norm statistics that no two layers share."""
    network = getattr(torchvision.models, name)(num_classes=10).eval()
    network.load_state_dict({key: fill(key, tuple(tensor.shape)) for key, tensor in network.state_dict().items()})
    return network


def assert_same_logits(ours, theirs):
    images = golden_input()[:, :, :64, :64]
    with torch.no_grad():
        a, b = ours(images), theirs(images)
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize(
    ("name", "form"), [("mobilenet_v2", "torchvision"), ("resnet18", "flat"), ("resnet50", "flat")]
)
def test_torchvision_files(save, name, form):
    theirs = torchvision_network(name)
    ours = models.create_model(name, 10).eval()
    assert models.load_checkpoint(ours, save(theirs.state_dict())) == {"format": form, "masks": {}, "extras": {}}
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mobilenet_v3_large"])
def test_torchvision_mobilenet_v3(save, name):
    """Its weights fit, its function differs, and the loader says so; made alike in both ways, the logits are equal."""
    theirs = torchvision_network(name)
    ours = models.create_model(name, 10).eval()
    with pytest.warns(UserWarning, match="squeezes after the activation"):
        info = models.load_checkpoint(ours, save(theirs.state_dict()))
    assert info["format"] == "torchvision"
    assert "epsilon of 1e-3" in info["note"]

    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    for feature in theirs.features[2:-1]:  # all but the first block expand
        _, depthwise, *squeeze, _ = feature.block
        if squeeze:
            feature.block[2] = nn.Sequential(squeeze[0], depthwise[2])
            depthwise[2] = nn.Identity()
    assert_same_logits(ours, theirs)


# Checkpoints that do not


def test_no_file(tmp_path):
    network = models.create_model("resnet20", 10)
    assert refusal(network, tmp_path / "missing.pt") == "No such file or directory"
    assert refusal(network, tmp_path) == "Is a directory"
    (tmp_path / "empty.pt").touch()
    assert refusal(network, tmp_path / "empty.pt") == "is empty"


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_at_any_byte(tmp_path, zipped):
    network = models.create_model("resnet20", 10)
    path = tmp_path / "whole.pt"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=zipped)
    models.load_checkpoint(network, path)
    whole = path.read_bytes()
    for size in (1, 3, 10, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated, or no checkpoint" in refusal(network, path)


@pytest.mark.parametrize(
    "content", [b"hello world\n" * 9, b"{}", b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(range(256)) * 9]
)
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    assert "no checkpoint" in refusal(models.create_model("resnet20", 10), path)


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-has-run",)


@pytest.mark.parametrize("content", [Code(), {"state_dict": {"conv1.weight": Code()}}])
def test_code_is_never_run(save, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    network = models.create_model("resnet20", 10)
    assert "mkdir, which only code could rebuild (code in a checkpoint is never run)" in refusal(network, save(content))
    for protocol in (0, 2, 4):
        (tmp_path / "pickle.pt").write_bytes(pickle.dumps(content, protocol))
        assert "code in a checkpoint is never run" in refusal(network, tmp_path / "pickle.pt")
    assert not (tmp_path / "code-has-run").exists()
    assert "holds torch.nn.modules.linear.Linear" in refusal(network, save(nn.Linear(1, 1)))


def test_no_state_dict_inside(save):
    network = models.create_model("resnet20", 10)
    assert refusal(network, save([torch.zeros(1)])) == "holds a list, not a dictionary"
    assert refusal(network, save({})) == "no state_dict in it (nothing at all)"
    assert refusal(network, save({"epoch": 3})) == "no state_dict in it (epoch is no tensor)"
    assert (
        refusal(network, save({"state_dict": {"conv1.weight": [1]}}))
        == "no state_dict in it (conv1.weight is no tensor)"
    )
    assert models.read_checkpoint(save({"epoch": 3})) == {"epoch": 3}


def test_misfits_tensor_by_tensor(save):
    network = models.create_model("mobilenet_v2", 10)
    tensors = network.state_dict()
    bias = tensors.pop("classifier.1.bias")  # no batch norm follows: not zero by any rule
    assert refusal(network, save(tensors)) == "does not fit mobilenet_v2: missing classifier.1.bias"
    tensors["classifier.1.bias"] = bias
    tensors |= {"head.weight": bias, "features.1.conv.1.mask": torch.ones(2), "features.1.mask": bias}
    tensors["features.0.0.weight"] = torch.zeros(32, 1, 3, 3)
    assert refusal(network, save(tensors)).removeprefix("does not fit mobilenet_v2: ").split("; ") == [
        "features.0.0.weight is (32, 1, 3, 3) in the file, (32, 3, 3, 3) in the network",
        "unexpected head.weight",
        "features.1.conv.1.mask is (2,) in the file, (32,) in the network",
        "unexpected features.1.mask",
    ]


def test_a_missing_convolution_is_not_a_missing_bias(save):
    network = models.create_model("mobilenet_v1", 10)
    tensors = network.state_dict()
    del tensors["features.3.3.weight"], tensors["features.3.3.bias"]
    expected = "does not fit mobilenet_v1: missing features.3.3.weight; missing features.3.3.bias"
    assert refusal(network, save(tensors)) == expected


def test_other_number_of_classes(save):
    tensors = models.create_model("resnet50", 100).state_dict()
    network = models.create_model("resnet50", 10)
    assert refusal(network, save(tensors)) == (
        "does not fit resnet50: fc.weight is (100, 2048, 1, 1) in the file, (10, 2048, 1, 1) in the network; "
        "fc.bias is (100,) in the file, (10,) in the network"
    )
    said = refusal(network, save({"arch": "resnet50", "num_classes": 100, "state_dict": tensors}))
    assert said.startswith("does not fit resnet50: the file's num_classes is 100, the network's 10; fc.weight is ")


def test_other_architecture(save):
    network = models.create_model("resnet56", 10)
    tensors = models.create_model("resnet20", 10).state_dict()
    said = refusal(network, save({"arch": "resnet20", "state_dict": tensors}))
    assert said.startswith(
        "does not fit resnet56: the file's arch is resnet20, the network's resnet56; missing layer1.3"
    )
    assert said.endswith("; ... and 172 more")
    assert said.count("; ") == 9

    fits_by_chance = {"arch": "resnet44", "state_dict": network.state_dict()}
    assert refusal(network, save(fits_by_chance)).endswith("the file's arch is resnet44, the network's resnet56")
    models.load_checkpoint(
        network, save(fits_by_chance | {"arch": "ResNet-56"})
    )  # another spelling is no other network


def test_torchvision_vgg_is_refused(save):
    theirs = torchvision.models.vgg16_bn(num_classes=10, init_weights=False).state_dict()
    theirs = {key: tensor for key, tensor in theirs.items() if not key.startswith("classifier.0")}  # 100 million values
    said = refusal(models.create_model("vgg16_bn", 10), save(theirs))
    assert said.startswith(
        "does not fit vgg16_bn: missing classifier.weight; missing classifier.bias; unexpected features.0"
    )
