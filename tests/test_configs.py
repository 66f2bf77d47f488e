"""Recipes against their table and the options they set; the published curves and the figure drawn from them."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest

import imagenet
import models
from configs import generate
from jobs.prune import create_method
from raw_data_fig4 import plot

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").glob("*/*.yml"))
BLOCK_FILES = [path for path in FILES if path.parent.name in ("1xn", "cifar10")]


def script(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def test_files_are_what_the_table_says():
    done = script("configs/generate.py", "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_names_what_differs(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    changed, missing = tmp_path / "configs/1xn/resnet50_1x2.yml", tmp_path / "configs/cifar10/resnet56_filter.yml"
    changed.write_text("lr: 1")
    missing.unlink()
    (tmp_path / "configs/1xn/mine.yml").touch()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(
        name in line for name in ("different: configs/1xn/resnet50_1x2", "missing: configs/cifar10/", "mine.yml")
    )


def test_every_published_row_has_its_recipe():
    rows = {arch: len(patterns) for arch, patterns in generate.PUBLISHED.items()}
    table = 2 + 5  # weight, filter, 1x2 to 1x32
    assert rows == {
        "mobilenet_v1": table,
        "mobilenet_v2": table + 5,  # and without rearrangement
        "mobilenet_v3_small": table,
        "mobilenet_v3_large": table,
        "resnet50": table + 2,  # and the kernel-wise study
    }
    assert len(BLOCK_FILES) == sum(rows.values()) + 2 * (2 + 4 + 4 + 2)
    phases = {"pretrain", "bip", "hydra", "finetune"}
    published = {f"{data}_{phase}" for data in ("cifar10", "cifar100", "tiny_imagenet") for phase in phases}
    assert {path.stem for path in (ROOT / "configs" / "bip").glob("*.yml")} == published | {
        "imagenet_pretrain",
        "imagenet_bip",
    }


@cache
def network(arch: str):
    return models.create_model(arch)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in FILES])
def test_a_recipe_is_a_run_that_can_start(path: Path):
    options = imagenet.parse(["--config", str(path)])
    assert str(options.job_dir) == f"experiments/{path.stem}"
    create_method(options).check(network(options.arch))
    command = path.read_text().splitlines()[0]
    assert command.startswith(f"# python imagenet.py --config {path.relative_to(ROOT)} --data_path ")


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in BLOCK_FILES])
def test_a_recipe_of_blocks_is_what_its_name_says(path: Path):
    options = imagenet.parse(["--config", str(path)])
    assert path.stem.startswith(options.arch)
    assert options.own.pr_target == 0.5
    assert ("1x" in path.stem) == (options.conv_type == "BlockL1Conv")
    if "1x" in path.stem:
        assert options.own.rearrange == ("plain" not in path.stem)


def test_bip_phases_start_from_each_other():
    for path in (ROOT / "configs" / "bip").glob("*.yml"):
        options, command = imagenet.parse(["--config", str(path)]), path.read_text().splitlines()[0]
        if options.own.exp_mode != "pretrain":
            folder = command.split(" --pretrained_model ")[1].split("/")[1]
            assert (path.parent / f"{folder}.yml").exists()
            assert options.own.k == 0.1
    options = imagenet.parse(["--config", str(ROOT / "configs/bip/imagenet_bip.yml"), "--k", "0.05"])
    own = options.own
    assert (options.arch, options.lr, own.mask_lr, own.score_init) == ("resnet18", 0.01, 0.1, "random")
    assert own.k == 0.05, "the command line wins"


def test_stripes_have_the_published_recipe():
    files = {path.stem: imagenet.parse(["--config", str(path)]) for path in (ROOT / "configs" / "swp").glob("*.yml")}
    on_cifar = {f"{arch}_{data}" for arch in ("vgg16_bn", "resnet56_projection") for data in ("cifar10", "cifar100")}
    assert files.keys() == on_cifar | {"resnet18_imagenet", "resnet18_imagenet_stronger"}
    for name in on_cifar:
        options = files[name]
        assert (options.own.sr, options.lr, options.train_batch_size, options.num_epochs) == (1e-5, 0.1, 64, 160)
        rates = [options.schedule()(epoch, 0, 1) for epoch in (0, 79, 80, 120)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_pocket_sizes_exist():
    for path in (ROOT / "configs" / "1xn").glob("*.yml"):
        (line,) = [line for line in path.read_text().splitlines() if line.startswith("# pocket size: ")]
        assert (ROOT / line.removeprefix("# pocket size: ")).exists()


@pytest.mark.parametrize("arch", ["mobilenet_v2", "resnet50"])
def test_tables_and_curves_are_of_the_same_runs(arch: str):
    for place, metric in enumerate(plot.METRICS):
        rates, curves = plot.read_curves(arch, metric)
        assert rates == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
        for pattern, accuracy in generate.PUBLISHED[arch].items():
            if pattern in curves and (arch, pattern) != ("mobilenet_v2", "1x4"):  # the misprinted row
                assert curves[pattern][4] == pytest.approx(accuracy[place], abs=0.0051)  # some are printed to 0.01


def write_summary(path: Path, **changes) -> Path:
    summary = {
        "arch": "mobilenet_v2",
        "data_set": "imagefolder",
        "method": "1x4 blocks, pr_target 0.5, rearrange",
        "totals": {"sparsity": 0.49},
        "accuracy": {"tuned": {"top1": 69.6, "top5": 88.9}},
    }
    path.write_text(json.dumps(summary | changes))
    return path


def test_the_figure_has_four_panels_and_one_more_row_for_another_network(tmp_path: Path):
    own = [write_summary(tmp_path / "a.json"), write_summary(tmp_path / "b.json", arch="resnet20", data_set="cifar10")]
    done = script("raw_data_fig4/plot.py", *own, "--out", tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "new" / "fig4.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(tmp_path / "new" / "fig4.svg").getroot().tag.endswith("svg")

    assert len(plot.draw([]).axes) == 4
    figure = plot.draw([plot.read_run(path) for path in own])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == 2 * ["MobileNet-V2, ImageNet"] + 2 * ["ResNet-50, ImageNet"] + 2 * ["resnet20, cifar10"]
    assert [len(axes.lines) for axes in figure.axes] == [9, 9, 8, 8, 1, 1]
    curves, ours = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert len(curves) == 8
    assert ours == ["ours: 1x4 blocks, rearrange"]


def test_where_a_run_lies(tmp_path: Path):
    dense = plot.read_run(write_summary(tmp_path / "a.json", method="dense", totals={"sparsity": 0.0}))
    assert (dense.method, dense.pattern, dense.rate) == ("dense", "baseline", 0.0)
    blocks = plot.read_run(write_summary(tmp_path / "b.json"))
    assert (blocks.pattern, blocks.rate, blocks.accuracy) == ("1x4", 0.49, {"top1": 69.6, "top5": 88.9})
    weight = plot.read_run(write_summary(tmp_path / "c.json", method="weights, pr_target 0.5"))
    assert (weight.method, weight.pattern) == ("weights", "weight")


def test_a_wrong_summary_is_refused(tmp_path: Path):
    done = script("raw_data_fig4/plot.py", write_summary(tmp_path / "a.json", accuracy={}), "--out", tmp_path / "new")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a.json: not a summary.json of imagenet.py: 'tuned' is missing" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"method": 3}', '{"method": "weight"}', "\x80"])
def test_what_is_no_summary_is_a_users_mistake(tmp_path: Path, text: str):
    path = tmp_path / "summary.json"
    path.write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=r"summary\.json: not"):
        plot.read_run(path)
