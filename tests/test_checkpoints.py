"""Checkpoints as others write them, and damaged ones: loaded with all their values, or refused in one line."""

import argparse
import os
import pathlib
import warnings

import numpy as np
import pytest
import torch
from test_models import filled, refusal, same, save  # noqa: F401 (a fixture)
from torch import nn
from torch.nn.utils import prune

import models
from structure import shrink

NAME = "resnet20"


def network(num_classes: int = 10, seed: int = 1) -> nn.Module:
    return models.create_model(NAME, num_classes, seed=seed)


@pytest.fixture(scope="module")
def tensors() -> dict:
    return filled(NAME, num_classes=10).state_dict()


def prefixed(tensors: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# Containers and prefixes of other trainers


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("_orig_mod.", None),
        ("module._orig_mod.", None),
        ("_orig_mod.module.", None),
        ("model.", "without model."),
        ("module.model.", "without model."),
        ("net.backbone.", "without net.backbone."),
    ],
)
def test_names_lose_what_wrappers_put_before_them(save, tensors, prefix, said):  # noqa: F811
    ours = network()
    note = models.load_checkpoint(ours, save({"state_dict": prefixed(tensors, prefix)})).get("note")
    assert same(ours.state_dict(), tensors)
    assert note is None if said is None else said in note


def test_parts_compiled_by_themselves(save, tensors):  # noqa: F811
    ours = network()
    names = {name.replace("layer2.", "layer2._orig_mod."): tensor for name, tensor in tensors.items()}
    models.load_checkpoint(ours, save(names))
    assert same(ours.state_dict(), tensors)


def test_a_name_twice_is_refused(save, tensors):  # noqa: F811
    both = tensors | {"module.conv1.weight": torch.zeros(1)}
    assert refusal(network(), save(both)) == "has conv1.weight twice, with and without a wrapper's prefix"


@pytest.mark.parametrize("key", ["model_state_dict", "net", "network", "state_dict_ema", "model_ema"])
def test_which_part_of_a_file_was_taken_is_said(save, tensors, key):  # noqa: F811
    ours = network()
    raw = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    held = prefixed(tensors, "module.") | {"n_averaged": torch.tensor(3)} if key == "model_ema" else tensors
    content = {"state_dict": raw} if "ema" in key else {}
    info = models.load_checkpoint(ours, save(content | {key: held, "epoch": 5, "optimizer_state_dict": {}}))
    assert same(ours.state_dict(), tensors)
    assert info["format"] == key
    assert key in info["note"]
    assert info["epoch"] == 5


def test_one_container_in_another_but_none_in_itself(save, tensors):  # noqa: F811
    ours = network()
    models.load_checkpoint(ours, save({"model": {"state_dict": tensors}}))
    assert same(ours.state_dict(), tensors)
    endless = {}
    endless["model"] = endless
    assert refusal(network(), save(endless)) == "no state_dict in it (model is no tensor)"


def test_values_of_other_libraries_beside_the_tensors(save, tensors):  # noqa: F811
    options = argparse.Namespace(lr=np.float64(0.1), output=pathlib.Path("out"), milestones=np.arange(3))
    ours = network()
    content = {"model": tensors, "args": options, "best_acc": np.float32(91.5), "flags": {"x", "y"}}
    info = models.load_checkpoint(ours, save(content))
    assert same(ours.state_dict(), tensors)
    assert info["best_acc"] == 91.5
    ours = network()
    models.load_checkpoint(ours, save({name: tensor.numpy() for name, tensor in tensors.items()}))
    assert same(ours.state_dict(), tensors)


def test_files_of_torch_prune(save, tensors):  # noqa: F811
    theirs = network()
    theirs.load_state_dict(tensors)
    prune.random_unstructured(theirs.conv1, "weight", 0.5)
    prune.ln_structured(theirs.layer2[0].conv1, "weight", 0.5, n=2, dim=0)
    prune.random_unstructured(theirs.linear, "bias", 0.5)
    ours = network().eval()
    info = models.load_checkpoint(ours, save(theirs.state_dict()))
    assert info["masks"].keys() == {"conv1", "layer2.0.conv1"}
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs.eval()(images))
    assert ours.linear.bias.count_nonzero() == 5


# Kinds of tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors_are_read_as_dense_ones(save, tensors, layout):  # noqa: F811
    ours, thinned = network(), {k: t * (t > 0.1) if t.is_floating_point() else t for k, t in tensors.items()}
    thinned |= {k: t.abs() for k, t in tensors.items() if k.endswith("running_var")}
    convert = {"coo": lambda t: t.to_sparse(), "csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else t}[layout]
    models.load_checkpoint(ours, save({k: convert(t) if t.dim() > 1 else t for k, t in thinned.items()}))
    assert same(ours.state_dict(), thinned)


@pytest.mark.filterwarnings("ignore")
def test_a_sparse_tensor_takes_no_memory_before_its_size_is_checked(save, tensors):  # noqa: F811
    none = torch.zeros(2, 0, dtype=torch.long)
    huge = torch.sparse_coo_tensor(none, torch.zeros(0), (1 << 20, 1 << 20))
    assert "conv1.weight: a sparse tensor of (1048576, 1048576) is too large" in refusal(
        network(), save(tensors | {"conv1.weight": huge})
    )


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_another_shape_takes_no_memory(save, tensors):  # noqa: F811
    """One number that is repeated by a stride of 0: its values would take a terabyte."""
    giant = torch.zeros(1).expand(1 << 19, 1 << 19)
    said = refusal(network(), save(dict(tensors) | {"conv1.weight": giant}))
    assert "conv1.weight is (524288, 524288) in the file, (16, 3, 3, 3) in the network" in said


def test_a_mask_of_other_numbers_than_0_and_1_is_none(save, tensors):  # noqa: F811
    """It would scale the weights without a word."""
    path = save(dict(tensors) | {"conv1.mask": torch.full((16, 3, 3, 3), 0.5)})
    assert "conv1.mask holds other numbers than 0 and 1" in refusal(network(), path)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_point_types(save, tensors, kind):  # noqa: F811
    ours, variances = network(), tensors["bn1.running_var"].to(kind)
    models.load_checkpoint(ours, save(dict(tensors) | {"bn1.running_var": variances}))
    assert torch.equal(ours.bn1.running_var, variances.float())


def test_tensors_that_are_no_weights_are_named(save, tensors):  # noqa: F811
    weight = tensors["conv1.weight"]
    broken, negative = weight.clone(), -tensors["bn1.running_var"]
    broken[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    for name, tensor, said in (
        ("conv1.weight", torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "is quantised (torch.qint8)"),
        ("conv1.weight", weight.to("meta"), "has a shape but no values"),
        ("conv1.weight", weight.to(torch.int8), "holds int8 in place of weights"),
        ("conv1.weight", torch.complex(weight, weight), "holds complex64 in place of weights"),
        ("conv1.weight", broken, "has 2 numbers that are not finite"),
        ("conv1.weight", weight.double() + 1e300, "has 432 numbers that are not finite"),
        ("bn1.running_var", negative, "has variances below zero"),
    ):
        assert f"{name} {said}" in refusal(network(), save(tensors | {name: tensor}))


def test_shapes_that_no_format_has_are_refused_in_one_line(save, tensors):  # noqa: F811
    """Folding scales, compactors and stripes meets tensors of any shape."""
    for name in ("layer1.0.conv1.FilterSkeleton", "layer1.0.bn1.compactor.weight", "layer1.0.conv1.mask"):
        for tensor in (torch.tensor(1.0), torch.ones(3), torch.ones(2, 2, dtype=torch.bool), torch.ones(0, 1, 1, 1)):
            refusal(network(), save(tensors | {name: tensor}))
            refusal(network(), save(tensors | {name: tensor, "layer1.0.conv1.weight": torch.tensor(1.0)}))


# Damage


def test_a_flipped_bit_in_any_record_is_found(tmp_path, tensors):
    """`torch.load` alone reads most such files, with other weights."""
    path = tmp_path / "file.pt"
    torch.save(tensors, path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for at in rng.integers(len(whole), size=60):
        content = bytearray(whole)
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        ours = network()
        try:
            models.load_checkpoint(ours, path)
        except ValueError as error:
            refused += 1
            told = str(error)
            assert "\n" not in told
        else:
            assert same(ours.state_dict(), tensors)  # it was in what fills the space between records
    assert refused > 40
    content = bytearray(whole)
    content[whole.index(tensors["conv1.weight"].numpy().tobytes()[:64])] ^= 1
    path.write_bytes(content)
    assert "damaged: record file/data/" in refusal(network(), path)


def test_checksums_that_were_not_computed_are_not_missed(tmp_path, tensors):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    ours = network()
    models.load_checkpoint(ours, tmp_path / "file.pt")
    assert same(ours.state_dict(), tensors)


def test_other_things_that_are_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    assert refusal(network(), tmp_path / "pipe.pt") == "is no regular file"  # reading one waits for ever
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
    assert "is a TorchScript program" in refusal(network(), tmp_path / "script.pt")


def test_a_finished_network_is_no_run_to_resume(tmp_path):
    models.save_checkpoint(tmp_path / "final.pt", network(), epoch=3)
    assert models.read_checkpoint(tmp_path / "final.pt", needs=("epoch", "arch"))["epoch"] == 3
    with pytest.raises(ValueError, match=r"final\.pt: no run to resume: it has no optimizers, loader$"):
        models.read_checkpoint(tmp_path / "final.pt", needs=("epoch", "optimizers", "loader"))


# Other classes


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("name", ["resnet20", "resnet18_cifar", "mobilenet_v3_small"])
def test_a_fresh_classifier_for_other_classes(save, name, tagged):  # noqa: F811
    """Linear layers and 1x1 convolutions; all but the classifier is the file's."""
    theirs, ours = models.create_model(name, 20, seed=1), models.create_model(name, 10, seed=2)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    tags = {"arch": name, "num_classes": 20, "classes": [str(n) for n in range(20)]} if tagged else {}
    path = save({"state_dict": theirs.state_dict()} | tags)
    assert "does not fit" in refusal(ours, path)
    info = models.load_checkpoint(ours, path, fresh_classifier=True)
    assert "of 20 classes is left out: one of 10 starts anew" in info["note"]
    assert info.keys().isdisjoint(("classes", "num_classes"))
    kept = {key for key, tensor in ours.state_dict().items() if torch.equal(tensor, before[key])}
    other = {key for key, tensor in ours.state_dict().items() if torch.equal(tensor, theirs.state_dict().get(key))}
    last = list(before)[-1].rpartition(".")[0]
    assert {f"{last}.weight", f"{last}.bias"} <= kept
    assert before.keys() - other <= {f"{last}.weight", f"{last}.bias"}


def test_a_fresh_classifier_on_a_narrow_network(tmp_path):
    theirs = filled(NAME, num_classes=20)
    with torch.no_grad():
        theirs.layer3[2].bn2.weight[:] = 0
        for block in theirs.layer1:
            block.conv1.weight[:5] = 0
            block.bn1.bias[:5] = block.bn1.running_mean[:5] = 0
    shrink(theirs)
    models.save_checkpoint(tmp_path / "narrow.pt", theirs)
    ours = network()
    assert models.load_checkpoint(ours, tmp_path / "narrow.pt", fresh_classifier=True)["widths"]["linear"] == 10
    assert ours(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert models.widths(ours) == models.widths(theirs) | {"linear": 10}


def test_a_classifier_that_fits_is_taken(save, tensors):  # noqa: F811
    ours, classes = network(), [str(n) for n in range(10)]
    path = save({"state_dict": tensors, "classes": classes})
    assert "note" not in models.load_checkpoint(ours, path, classes=classes, fresh_classifier=True)
    assert same(ours.state_dict(), tensors)


def test_facts_of_another_kind_are_none(save, tensors):  # noqa: F811
    """Others mean something else by these words, or the file is damaged."""
    for value in (3, "x", [None], {1: 2}, torch.ones(2)):
        facts = dict.fromkeys(("classes", "widths", "kept", "deps", "options", "accuracy", 3), value)
        ours = network()
        try:
            models.load_checkpoint(ours, save({"state_dict": tensors} | facts), fresh_classifier=True)
        except ValueError:
            assert isinstance(value, dict)  # no widths of this network
        else:
            assert same(ours.state_dict(), tensors)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ("bcdefghijk", "only the file has a and only the data has k"),
        ("bacdefghij", "number 0 is a in the file, b in the data"),
        ("abcdefghijj", "number 10 is nothing in the file, j in the data"),
    ],
)
def test_as_many_classes_but_others(save, tensors, classes, said):  # noqa: F811
    """Such a network evaluates to nothing, or to a number that means nothing."""
    path = save({"state_dict": tensors, "classes": list("abcdefghij")})
    with pytest.raises(ValueError, match=f"the file's classes are not those of the data: {said}"):
        models.load_checkpoint(network(), path, classes=list(classes))
    ours, before = network(), network().linear.weight
    note = models.load_checkpoint(ours, path, classes=list(classes), fresh_classifier=True)["note"]
    assert "starts anew" in note
    assert torch.equal(ours.linear.weight, before)
    assert torch.equal(ours.conv1.weight, tensors["conv1.weight"])


def test_a_network_without_one_classifier_cannot_get_a_fresh_one(save, tensors):  # noqa: F811
    ours = nn.Sequential(network(), nn.Softmax(1))
    with pytest.raises(ValueError, match="Sequential: no single layer writes its logits"):
        models.load_checkpoint(ours, save(prefixed(tensors, "0.")), fresh_classifier=True)
