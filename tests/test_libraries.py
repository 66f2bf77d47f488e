"""Networks by the names of their libraries or of the user's functions: built, saved, found again, and made plain."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import imagenet
import models
from data.folder import Pictures
from data.loader import MEAN
from data.trees import class_tree
from models import libraries
from structure.plain import SamePadding, in_words, plainify
from utils.options import Options

timm = pytest.importorskip("timm")
ROOT = Path(__file__).resolve().parent.parent
SMALL = {"timm": "timm/mobilenetv3_small_050", "torchvision": "torchvision/shufflenet_v2_x0_5"}
OWN = """
from torch import nn

def build(num_classes, width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes),
    )
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own_network.py").write_text(OWN)
    return f"{tmp_path / 'own_network.py'}:build"


def shaken(network: nn.Module) -> nn.Module:
    """The network in eval mode, with batch norms that change what they read."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL.values())
def test_a_library_builds_by_the_seed(name: str):
    """Catches weights that depend on chance outside, and names of tensors that are not the library's."""
    first, again = (models.create_model(name, 7, seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    own = name.partition("/")[2]
    theirs = timm.create_model(own) if name.startswith("timm") else libraries._torchvision().get_model(own)
    assert first.keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/mobilenetv3_smal_050", r"timm has \d+ networks, but not this one; close: .*mobilenetv3_small_050"),
        ("torchvision/ssdlite320", r"torchvision has \d+ networks, but not this one"),
        ("timm/", "unknown network 'timm/'"),
        ("missing.py:build", "there is no file missing.py"),
        ("missing_module:build", r"cannot be imported: ModuleNotFoundError: No module named 'missing_module'"),
        ("math:pi_of", "math has no function pi_of"),
        ("math:", "must be FILE.py:FUNCTION"),
        ("builtins:dict", "returns a dict, not a torch.nn.Module"),
    ],
)
def test_a_name_that_means_nothing_is_refused_in_one_line(name: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        models.create_model(name, 3)
    assert "\n" not in str(error.value)


def test_arguments_reach_the_function_and_wrong_ones_are_told(own: str):
    assert models.create_model(own, 3, width=4)[0].out_channels == 4
    assert Options(arch_options=["width=4", "act=relu", "drop=None"]).arguments() == {
        "width": 4,
        "act": "relu",
        "drop": None,
    }
    with pytest.raises(ValueError, match=r"with depth=2, num_classes=3: TypeError: .*depth"):
        models.create_model(own, 3, depth=2)
    with pytest.raises(ValueError, match="--arch_options width: resnet20 takes none"):
        models.create_model("resnet20", 3, width=2)
    with pytest.raises(ValueError, match="--arch_options pretrained: weights come from --pretrained_model"):
        models.create_model(SMALL["timm"], 3, pretrained=True)
    for word in ("width", "seed=3", "2=3"):
        with pytest.raises(ValueError, match=f"--arch_options {word}: must be "):
            Options(arch_options=[word])


def test_names_are_read_without_torch():
    """Catches a library, or torch, that is imported before a mistyped flag is answered."""
    program = "import sys, models, imagenet; imagenet.parse(['--arch', 'timm/anything']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_published_weights_are_a_librarys():
    with pytest.raises(ValueError, match=r"--pretrained_model published: exists for timm/NAME and .* not resnet20"):
        models.load_checkpoint(models.create_model("resnet20", 10), "published")


def test_a_download_that_fails_is_told_in_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to the host\nand more")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        ValueError, match=r"torchvision could not download .* \(no route to the host\): .* \.safetensors"
    ):
        models.load_checkpoint(models.create_model(SMALL["torchvision"], 1000), "published")


def test_a_library_says_how_pictures_are_prepared():
    assert libraries.preprocessing("timm/mobilenetv4_conv_small")["interpolation"] == "bicubic"
    assert libraries.preprocessing("torchvision/regnet_y_400mf") == {
        "interpolation": "bilinear",
        "crop": 224 / 232,
        "mean": list(MEAN),
        "std": [0.229, 0.224, 0.225],
    }
    assert libraries.preprocessing("timm/tf_efficientnet_lite0")["mean"] == [0.5] * 3
    assert libraries.preprocessing("resnet50") == {}


# --- files ------------------------------------------------------------------------------------------------------------


def test_safetensors_are_read_and_damaged_ones_refused(tmp_path):
    from safetensors.torch import save_file

    theirs, ours = (shaken(models.create_model(SMALL["timm"], 5, seed)) for seed in (1, 2))
    path = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), path)
    models.load_checkpoint(ours, path)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated, or no file of safetensors"):
        models.load_checkpoint(ours, path)


def test_a_plain_network_comes_back_from_its_file(tmp_path):
    """Its tensors have other names than the library's, and its file says so."""
    theirs = shaken(models.create_model(SMALL["timm"], 5, 1, act_layer="relu"))
    images = torch.randn(1, 3, 64, 64)
    expected = theirs(images)
    assert in_words(models.plainify(theirs)) == "34 BatchNormAct2d, 1 Linear"
    models.save_checkpoint(tmp_path / "final.pt", theirs, classes=list("abcde"))
    ours = models.create_model(SMALL["timm"], 5, act_layer="relu")
    said = models.load_checkpoint(ours, tmp_path / "final.pt")
    assert torch.allclose(ours.eval()(images), expected, atol=1e-5)
    assert said["library"] == f"timm {timm.__version__}"
    assert said["arch_options"] == {"act_layer": "relu"}
    with pytest.raises(ValueError, match="the file's arch_options is"):
        models.load_checkpoint(models.create_model(SMALL["timm"], 5), tmp_path / "final.pt")


def test_a_run_of_the_users_own_network(own: str, tmp_path, capsys):
    """Pruned, exported, resumed and evaluated; a file alone does not make us run the code that it names."""
    words = ["--arch", own, "--arch_options", "width=8", "--method", "block_l1", "--N", "4", "--image_size", "16"]
    words += ["--num_epochs", "1", "--debug", "--train_batch_size", "8", "--lr", "0.01", "--mean", "0.5", "0.5", "0.5"]
    imagenet.main([*words, "--job_dir", str(tmp_path / "job")])
    imagenet.main([*words, "--resume", "--job_dir", str(tmp_path / "job")])
    final = str(tmp_path / "job" / "checkpoint" / "final.pt")
    with pytest.raises(ValueError, match=r"its network is made by code: --arch .*own_network.py:build allows"):
        imagenet.main(["--evaluate", final])
    capsys.readouterr()
    imagenet.main(["--evaluate", final, "--arch", own, "--export_onnx", "--job_dir", str(tmp_path / "again")])
    assert "ONNX Runtime agrees" in capsys.readouterr().out


def test_a_pruned_plain_network_is_repaired_to_its_librarys_dense_one(tmp_path: Path, capsys):
    """The pruned file has plain layers, the dense one the library's: catches a file that is read into the other's."""
    name = "timm/test_efficientnet"
    dense = shaken(models.create_model(name, 10, 1))
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    assert "BatchNormAct2d" in in_words(models.plainify(dense))
    pruned = dense.get_submodule("blocks.0.0.conv")
    with torch.no_grad():
        pruned.weight[:4] = 0
    models.save_checkpoint(tmp_path / "pruned.pt", dense)
    words = ["--arch", name, "--image_size", "16", "--method", "dense", "--num_epochs", "0", "--calibration", "32"]
    words += ["--repair", "--pretrained_model", str(tmp_path / "pruned.pt")]
    imagenet.main([*words, "--dense_model", str(tmp_path / "dense.pth"), "--job_dir", str(tmp_path / "job")])
    assert "repaired: 1 layers on 32 pictures" in capsys.readouterr().out


# --- plain layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("timm/tf_mobilenetv3_small_minimal_100", "5 Conv2dSame, 34 BatchNormAct2d, 1 Linear"),
        ("timm/nf_regnet_b0", "ScaledStdConv2d"),
    ],
)
def test_plain_layers_compute_the_same(name: str, replaced: str):
    """Odd sizes and even ones, since "same" padding depends on what a stride leaves over."""
    network = shaken(models.create_model(name, 5)).double()
    pictures = [torch.randn(1, 3, side, side + 1, dtype=torch.float64) for side in (63, 64)]
    with torch.no_grad():
        before = [network(images) for images in pictures]
        said = in_words(plainify(network.float()))
        after = [network.double()(images) for images in pictures]
    assert replaced in said
    for ours, theirs in zip(after, before, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert {type(m) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {nn.Conv2d, nn.Linear}
    assert plainify(network) == {}


def test_plain_layers_train_and_evaluate_as_before():
    """Catches a batch norm that forgets its momentum, its mode, or that a tensor is shared or frozen."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4, momentum=0.3))
    network[1].weight.requires_grad_(False)
    network[1].eval()
    norm = network[1]
    plainify(network)
    assert network[1].norm.weight is norm.weight
    assert not network[1].norm.training
    assert network[1].norm.momentum == 0.3
    assert not network[1].norm.weight.requires_grad


class Halved(nn.Conv2d):
    """Computes what no plain convolution does: its output depends on the largest input."""

    def forward(self, x):
        return super().forward(x) / x.abs().max()


def test_a_layer_that_is_not_plain_stays_to_be_refused_by_name():
    network = nn.Sequential(Halved(3, 4, 1))
    assert plainify(network) == {}
    assert type(network[0]) is Halved


@pytest.mark.parametrize("side", [7, 8, 9])
def test_same_padding_has_one_output_a_stride(side: int):
    x = torch.randn(1, 3, side, side)
    padded = SamePadding((3, 3), (2, 2), (1, 1))(x)
    assert nn.functional.conv2d(padded, torch.zeros(1, 3, 3, 3), stride=2).shape[2] == -(-side // 2)
    assert torch.equal(padded[:, :, padded.shape[2] - 1], torch.zeros_like(padded[:, :, 0])), "zeros at the end first"


# --- pictures ---------------------------------------------------------------------------------------------------------


def picture(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    values = torch.arange(40 * 40 * 3).mul(7).remainder(256).byte().view(40, 40, 3)
    Image.fromarray(values.numpy()).save(path)


def test_pictures_are_cut_and_resized_as_torchvision_does(tmp_path):
    from PIL import Image
    from torchvision.transforms import v2

    picture(tmp_path / "a.png")
    ours, _ = Pictures([(str(tmp_path / "a.png"), 0)], 16, False, 0, False, 20, "bicubic")[0, 0]
    resize = v2.Resize(20, v2.InterpolationMode.BICUBIC, antialias=True)
    theirs = v2.Compose([v2.PILToTensor(), resize, v2.CenterCrop(16)])(Image.open(tmp_path / "a.png"))
    assert torch.equal(ours.permute(2, 0, 1), theirs)


def test_a_file_of_classes_numbers_a_part_of_them(tmp_path):
    """Without it, the three classes of ten that are there would be 0, 1 and 2."""
    for name in ("cat", "ant", "dog"):
        picture(tmp_path / name / "1.png")
    known = ["dog", "bee", "cat", "ant"]
    classes, samples = class_tree(tmp_path, known)
    assert classes == known
    assert {Path(path).parent.name: label for path, label in samples} == {"dog": 0, "cat": 2, "ant": 3}
    with pytest.raises(ValueError, match=r"has folders that --classes does not name: ant"):
        class_tree(tmp_path, known[:3])
