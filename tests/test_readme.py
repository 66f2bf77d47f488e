"""The README's commands and code, run as they stand but for paths, sizes and the number of epochs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for kind, text in fenced if kind == language]


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny ImageNet and a pretrained network, under the names that the README uses."""
    folder = tmp_path_factory.mktemp("readme")
    chance = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / "ImageNet" / part / name).mkdir(parents=True)
            for number in range(4):
                picture = Image.fromarray(chance.integers(0, 256, (40, 40, 3), dtype=np.uint8))
                picture.save(folder / "ImageNet" / part / name / f"{number}.jpg")
    torch.save(models.create_model("mobilenet_v2", 2).state_dict(), folder / "mobilenet_v2.pt")
    return folder


def test_prune_train_export_compile(folder: Path):
    (block,) = [block for block in blocks("") if "model_tune.py" in block]
    for line in block.replace("\\\n", " ").splitlines():
        command = shlex.split(line)
        program = ROOT / command[1]
        small = {"180": "1", "256": "4"}
        command = [sys.executable, str(program), *(small.get(word, word) for word in command[2:])]
        extra = ["--image_size", "32", "--workers", "0"] if program.name == "imagenet.py" else ["--runs", "5"]
        run([*command, *extra], folder)
    assert (folder / "experiments" / "v2_1x4" / "deploy" / "lib.so").exists()
    assert "block-sparse" in (folder / "experiments" / "v2_1x4" / "summary.md").read_text()
    loader = next(block for block in blocks("python") if "load_module" in block)
    (folder / "loader.py").write_text(loader)
    assert run([sys.executable, "../../loader.py"], folder / "experiments" / "v2_1x4").strip() in ("[0]", "[1]")


def test_your_own_network(folder: Path):
    code = next(block for block in blocks("python") if "create_method" in block)
    (folder / "own.py").write_text(code)
    assert run([sys.executable, "own.py"], folder).splitlines()[-1] == "(1, 10)"
