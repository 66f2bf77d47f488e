"""The road end to end, and what happens when it is interrupted or asked for the impossible."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill, mask_digest
from PIL import Image

import imagenet
import models
import pruning

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((Path(__file__).parent / "golden" / "masks_1xn.json").read_text())
DIGITS = ["--arch", "resnet20", "--data_set", "digits", "--image_size", "16", "--train_batch_size", "64", "--lr", "0.1"]
BLOCKS = ["--conv_type", "BlockL1Conv", "--N", "4", "--pr_target", "0.5", "--rearrange"]
EXTRAS = ["--ema", "0.9", "--distill", "0.3"]  # both have state of their own to resume


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "imagenet.py"), *map(str, arguments)]


def records(job_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (job_dir / "metrics.jsonl").read_text().splitlines()]


def same_state(a: Path, b: Path) -> bool:
    a, b = torch.load(a)["state_dict"], torch.load(b)["state_dict"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A trained dense network's job_dir."""
    job_dir = tmp_path_factory.mktemp("dense")
    imagenet.main([*DIGITS, "--conv_type", "DenseConv", "--num_epochs", "4", "--job_dir", str(job_dir)])
    return job_dir


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory) -> Path:
    job_dir = tmp_path_factory.mktemp("pruned")
    start = ["--pretrained_model", str(dense / "checkpoint" / "final.pt")]
    arguments = [*DIGITS, *BLOCKS, *EXTRAS, *start, "--num_epochs", "3", "--export_onnx"]
    imagenet.main([*arguments, "--job_dir", str(job_dir)])
    return job_dir


def test_a_run_leaves_what_it_promises(pruned: Path):
    files = {path.relative_to(pruned).as_posix() for path in pruned.rglob("*") if path.is_file()}
    promised = {"run.json", "metrics.jsonl", "summary.json", "summary.md", "summary.png", "model.onnx", "inputs.npy"}
    promised |= {f"checkpoint/{name}.pt" for name in ("last", "best", "final")}
    assert promised <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    summary = json.loads((pruned / "summary.json").read_text())
    accuracy = summary["accuracy"]
    assert accuracy["dense"]["top1"] > 80
    assert accuracy["tuned"]["top1"] > accuracy["pruned"]["top1"]
    assert {layer["sparsity"] for layer in summary["layers"] if layer.get("rate")} == {0.5}
    lines = records(pruned)
    assert [(line["epoch"], line["split"]) for line in lines[:4]] == [
        (0, "dense"),
        (0, "pruned"),
        (1, "train"),
        (1, "val"),
    ]
    assert {"loss", "top1", "top5", "lr", "images_per_second"} <= lines[2].keys()
    run = json.loads((pruned / "run.json").read_text())
    assert run["options"]["N"] == 4
    assert run["versions"]["torch"]


def test_the_exported_file_says_how_its_pictures_are_made(pruned: Path):
    """What evaluation did here must reach whoever deploys the file: without it, they guess the mean or the crop."""
    from data.loader import MEAN, STD
    from deploy.onnx.reader import read_onnx

    size = json.loads((pruned / "summary.json").read_text())["image_size"]
    whole = {"size": size, "resize": size, "interpolation": "bilinear", "crop": "center"}  # digits are used as they are
    classes = {"classes": [str(digit) for digit in range(10)]}
    assert read_onnx(pruned / "model.onnx").pictures == whole | {"mean": list(MEAN), "std": list(STD)} | classes


def test_a_compiled_library_is_as_right_as_the_network_it_was_made_from(pruned: Path, tmp_path, capsys):
    """Top-1 on class folders is that of the run: a wrong crop, mean, class order or a dropped picture would show."""
    from PIL import Image

    import model_tune
    from data.sources import Request, digits

    pytest.importorskip("tvm")
    rest = {"seed": 0, "device": torch.device("cpu"), "workers": 0, "skip_bad": False}
    request = Request(None, image_size=16, train_batch_size=1, eval_batch_size=1, **rest)
    for part, loader in zip(("train", "val"), digits(request), strict=True):
        chosen = range(0, loader.count, 20) if part == "train" else range(loader.count)
        for number in chosen:
            folder = tmp_path / "digits" / part / loader.classes[int(loader.labels[number])]
            folder.mkdir(parents=True, exist_ok=True)
            pad = loader.pad
            Image.fromarray(loader.images[number, pad : pad + 16, pad : pad + 16].numpy()).save(
                folder / f"{number}.png"
            )
    argv = [
        "--onnx_path",
        str(pruned / "model.onnx"),
        "--out",
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "digits"),
    ]
    argv += ["--batch", "5", "--threads", "1", "--runs", "3", "--peers", "onnxruntime_int8", "--calibration", "30"]
    assert model_tune.main(argv) == 0
    found = json.loads((tmp_path / "out" / "deploy.json").read_text())
    validation, saved = found["validation"], found["saved"]
    top1, right = validation["top1"], json.loads((pruned / "summary.json").read_text())["accuracy"]["tuned"]["top1"]
    assert validation["pictures"] == 364  # five do not divide them
    assert top1[saved] == pytest.approx(right, abs=0.01)
    assert top1["onnxruntime_dense"] == pytest.approx(right, abs=0.01)
    assert validation["agreement"]["onnxruntime_dense"] == 100
    assert abs(top1["onnxruntime_int8"] - right) <= 1
    assert 95 < validation["agreement"]["onnxruntime_int8"] <= 100
    assert (
        f"| ONNX Runtime, dense | float32 | {right:.2f} % | 100.00 % |" in (tmp_path / "out" / "deploy.md").read_text()
    )
    assert "top-1 on 364 validation pictures" in capsys.readouterr().out
    assert (tmp_path / "out" / "int8.onnx").is_file()


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_trained_network_keeps_its_accuracy_in_int8(pruned: Path, tmp_path, method):
    """Ranges from a few training pictures: half a per cent of the held-out digits may be lost, and no zero block."""
    import onnx

    import data
    import deploy
    from deploy.tuning.measure import peer

    sizes = {"train_batch_size": 1, "eval_batch_size": 1, "image_size": 16}
    rest = {"data_path": None, "seed": 0, "device": torch.device("cpu"), "workers": 0, "skip_bad": False}
    train, val = data.create_loaders("digits", augment=False, **sizes, **rest)
    pictures = [images.contiguous().numpy() for images, _ in train.spread(40)]
    int8 = deploy.quantise(pruned / "model.onnx", pictures, tmp_path / "int8.onnx", method)
    runs = [peer(path, 1) for path in (pruned / "model.onnx", int8)]
    right = [sum(int(run(images.numpy()).argmax() == labels) for images, labels in val) for run in runs]
    assert right[0] / val.count > 0.8
    assert right[1] >= right[0] - 0.005 * val.count
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(int8).graph.initializer}
    weights = [tensor for tensor in tensors.values() if tensor.dtype == np.int8 and tensor.ndim == 4]
    assert sum((weight == 0).mean() >= 0.5 for weight in weights) == 18


def test_the_exported_blocks_are_rows_and_the_outputs_the_networks(pruned: Path):
    import onnx
    import onnxruntime

    from pruning.groups import blocks_intact

    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(pruned / "model.onnx").graph.initializer]
    weights = [torch.tensor(tensor) for tensor in tensors if tensor.ndim == 4]
    sparse = [weight for weight in weights if (weight == 0).float().mean() > 0.4]
    assert len(sparse) == 18
    assert all(blocks_intact(weight, 4) for weight in sparse)
    network = models.create_model("resnet20", 10)
    models.load_checkpoint(network, pruned / "checkpoint" / "final.pt")
    images = np.load(pruned / "inputs.npy")
    outputs = onnxruntime.InferenceSession(str(pruned / "model.onnx")).run(None, {"images": images})[0]
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(images)).numpy()
    assert np.abs(outputs - expected).max() <= 1e-4 * np.abs(expected).max()


def test_evaluate_tells_the_same_accuracy_from_masked_and_folded_files(pruned: Path, capsys):
    for name in ("best.pt", "final.pt"):
        imagenet.main([*DIGITS, "--evaluate", str(pruned / "checkpoint" / name)])
    out = capsys.readouterr().out
    assert "1x4, scattered" in out
    figures = [line.split(": ", 1)[1] for line in out.splitlines() if "top-1" in line]
    val = [line["top1"] for line in records(pruned) if line["split"] == "val"]
    assert f"top-1 {max(val):.2f}" in figures[0]
    assert f"top-1 {val[-1]:.2f}" in figures[1]


def test_zero_epochs_write_the_published_masks(tmp_path):
    network = models.create_model("mobilenet_v2")
    torch.save({name: fill(name, tuple(t.shape)) for name, t in network.state_dict().items()}, tmp_path / "filled.pt")
    arguments = ["--arch", "mobilenet_v2", "--data_set", "fake", "--image_size", "32", *BLOCKS, "--num_epochs", "0"]
    imagenet.main([*arguments, "--pretrained_model", str(tmp_path / "filled.pt"), "--job_dir", str(tmp_path)])
    state = torch.load(tmp_path / "checkpoint" / "last.pt")["state_dict"]
    known = GOLDEN["mobilenet_v2"]["masks"]["BlockL1Conv|N4|p0.5|rearrange=True|full=False"]["digests"]
    assert {name: mask_digest(state[f"{name}.mask"]) for name in known} == known


def test_killed_and_resumed_runs_end_with_the_same_weights(dense: Path, pruned: Path, tmp_path):
    """SIGKILL at chance moments, then SIGTERM in the middle of an epoch, resumed each time by the same command."""
    start = ["--pretrained_model", dense / "checkpoint" / "final.pt"]
    arguments = command(*DIGITS, *BLOCKS, *EXTRAS, *start, "--num_epochs", 3, "--job_dir", tmp_path, "--resume")
    last = tmp_path / "checkpoint" / "last.pt"
    for number, signal_sent in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        seen = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == seen):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05 * number)
        process.send_signal(signal_sent)
        status = process.wait()
        assert status in ((-9, 0), (143, 0))[number], "asked to stop, it saves and says so"
    imagenet.main(arguments[2:])
    assert same_state(tmp_path / "checkpoint" / "final.pt", pruned / "checkpoint" / "final.pt")

    def curve(job_dir):
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in records(job_dir)]

    assert curve(tmp_path) == curve(pruned)


def test_a_new_run_moves_all_of_the_old_one_aside(tmp_path):
    """Else its report, its export or its library would count as the new run's."""
    arguments = [*DIGITS, "--conv_type", "DenseConv", "--num_epochs", "0", "--job_dir", str(tmp_path)]
    imagenet.main(arguments)
    (tmp_path / "model.onnx").write_bytes(b"of an earlier export")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "deploy.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("the user's own")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    imagenet.main([*arguments, "--seed", "1"])
    for path, content in before.items():
        inside = path.relative_to(tmp_path)
        assert (tmp_path / ("" if path.name == "notes.txt" else "earlier.1") / inside).read_bytes() == content
    assert not (tmp_path / "model.onnx").exists()
    assert not (tmp_path / "deploy").exists()
    assert not list(tmp_path.rglob(".*"))


def test_a_failed_start_leaves_an_earlier_run_as_it_is(dense: Path, tmp_path):
    arguments = [*DIGITS, "--num_epochs", "0", "--job_dir", str(tmp_path)]
    imagenet.main([*arguments, "--method", "dense"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path.parent / "wrong.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"wrong\.pt"):
        imagenet.main([*arguments, *BLOCKS, "--pretrained_model", str(tmp_path.parent / "wrong.pt")])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_finished_network_is_written_before_a_proof_can_fail(tmp_path, monkeypatch):
    def shrink(network):
        raise ValueError("shrink changed the network's outputs")

    monkeypatch.setitem(pruning.__dict__, "shrink", shrink)
    arguments = ["--method", "imp", "--layer_type", "filter", "--k", "0.5", "--num_epochs", "0", "--shrink"]
    with pytest.raises(ValueError, match="shrink changed"):
        imagenet.main([*DIGITS, *arguments, "--job_dir", str(tmp_path)])
    final = torch.load(tmp_path / "checkpoint" / "final.pt")
    assert final["kept"]["layer1.0.conv1"]["sparsity"] == 0.5


def test_a_score_of_the_data_sees_as_many_pictures_as_asked(dense: Path, tmp_path):
    """Taylor's masks need a gradient: they differ from L1's, and with the pictures."""
    start = ["--pretrained_model", str(dense / "checkpoint" / "final.pt"), "--num_epochs", "0"]
    masks = {}
    for name, own in {
        "l1": [],
        "taylor": ["--score", "taylor"],
        "fewer": ["--score", "taylor", "--calibration", "8"],
    }.items():
        imagenet.main([*DIGITS, "--method", "filter", *start, *own, "--job_dir", str(tmp_path / name)])
        state = torch.load(tmp_path / name / "checkpoint" / "last.pt")["state_dict"]
        masks[name] = torch.cat([tensor.flatten() for key, tensor in state.items() if key.endswith(".mask")])
    assert not torch.equal(masks["taylor"], masks["l1"])
    assert not torch.equal(masks["taylor"], masks["fewer"])


def test_resume_refuses_another_run(pruned: Path):
    arguments = [*DIGITS, *BLOCKS, "--num_epochs", "3", "--job_dir", str(pruned), "--resume", "--N", "8"]
    with pytest.raises(ValueError, match=r"--resume: .*last\.pt was made with .*--N 4 \(now 8\)"):
        imagenet.main(arguments)


def test_resume_takes_a_path(pruned: Path, dense: Path, tmp_path):
    start = ["--pretrained_model", str(dense / "checkpoint" / "final.pt"), "--num_epochs", "3"]
    arguments = [*DIGITS, *BLOCKS, *EXTRAS, *start, "--job_dir", str(tmp_path)]
    imagenet.main([*arguments, "--resume", str(pruned / "checkpoint" / "last.pt")])
    assert same_state(tmp_path / "checkpoint" / "final.pt", pruned / "checkpoint" / "final.pt")
    with pytest.raises(ValueError, match=r"nowhere\.pt: No such file"):
        imagenet.main([*arguments, "--resume", "nowhere.pt"])


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    arguments = [*DIGITS, "--conv_type", "DenseConv", "--job_dir", str(tmp_path), "--num_epochs", "2"]
    with pytest.raises(ValueError, match=r"the loss of iteration \d+ is (nan|inf)"):
        imagenet.main([*arguments, "--lr", "1e30"])
    assert not (tmp_path / "checkpoint" / "last.pt").exists()


def test_mixed_precision_trains(tmp_path):
    imagenet.main([*DIGITS, "--conv_type", "DenseConv", "--amp", "--num_epochs", "2", "--job_dir", str(tmp_path)])
    lines = [line for line in records(tmp_path) if line["split"] == "train"]
    assert lines[1]["loss"] < lines[0]["loss"]


def test_check_data_lists_what_does_not_decode(tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / part / "cat" / "good.png")
    arguments = ["--data_set", "imagefolder", "--data_path", str(tmp_path), "--check_data"]
    imagenet.main(arguments)
    (tmp_path / "val" / "cat" / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as end:
        imagenet.main(arguments)
    assert end.value.code == 1
    assert "val/cat/bad.jpg: not a picture" in capsys.readouterr().out


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def broken_files(folder: Path, dense: Path) -> dict[str, Path]:
    whole = (dense / "checkpoint" / "final.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage.pt").write_bytes(b"not a checkpoint")
    torch.save({"state_dict": Bomb()}, folder / "bomb.pt")
    return {name: folder / f"{name}.pt" for name in ("truncated", "garbage", "bomb")}


def test_broken_checkpoints_are_one_line(dense: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in broken_files(tmp_path, dense).items():
        with pytest.raises(ValueError, match=str(path)) as error:
            imagenet.main([*DIGITS, "--evaluate", str(path)])
        assert "\n" not in str(error.value), name
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ValueError, match="resnet20") as error:
        imagenet.main(["--arch", "resnet32", *DIGITS[2:], "--evaluate", str(dense / "checkpoint" / "final.pt")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "alexnet"], "unknown network 'alexnet': choose one of mobilenet_v1"),
        (["--data_set", "mnist"], "unknown data set 'mnist'"),
        (["--conv_type", "MagicConv"], "unknown method 'MagicConv'"),
        (["--N", "9999"], "--N 9999: longer than the widest layer"),
        (["--pr_target", "1"], "--pr_target 1.0: must be in"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=message) as error:
        imagenet.main(arguments)
    assert "\n" not in str(error.value)


def test_a_mistake_exits_with_status_2_and_no_traceback():
    done = subprocess.run(command("--pr_target", "1.5"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "imagenet.py: --pr_target 1.5: must be in [0, 1)\n"
    assert done.stdout == ""
