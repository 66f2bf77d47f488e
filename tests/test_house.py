"""The house of the design: who may import whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOOR = {
    **dict.fromkeys(("structure", "utils"), 1),
    "models": 2,
    **dict.fromkeys(("pruning", "data", "deploy"), 3),
    "jobs": 4,
    **dict.fromkeys(("imagenet", "model_tune", "configs", "raw_data_fig4"), 5),
    **dict.fromkeys(("benchmarks", "docs"), 6),
}
SCRIPTS = ("benchmarks", "configs", "raw_data_fig4", "docs")  # folders of programs that nothing imports
LATE = {
    "nvidia",
    "lmdb",
    "tvm",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "MNN",
    "h5py",
}  # imported where needed, when needed


def files():
    paths = sorted(ROOT.glob("*.py")) + [p for room in FLOOR for p in sorted((ROOT / room).glob("**/*.py"))]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, deep: bool = True):
    """Top names of imported modules; only those that run at import unless `deep`."""
    nodes = ast.walk(tree) if deep else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", files())
def test_imports_go_down_the_floors(path: Path):
    here = room_of(path)
    for name in imports(ast.parse(path.read_text())):
        if name in FLOOR and name != here:
            assert FLOOR[name] < FLOOR[here], f"{here} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[name]})"


@pytest.mark.parametrize("path", [p for p in files() if room_of(p.values[0]) not in ("deploy", "model_tune")])
def test_heavy_packages_are_imported_late(path: Path):
    assert not LATE & set(imports(ast.parse(path.read_text()), deep=False))


@pytest.mark.parametrize("path", [p for p in files() if room_of(p.values[0]) in ("deploy", "model_tune")])
def test_deployment_needs_no_torch(path: Path):
    assert not {"torch", "torchvision"} & set(imports(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", [p for p in files() if room_of(p.values[0]) == "structure"])
def test_structure_needs_torch_only(path: Path):
    assert set(imports(ast.parse(path.read_text()))) - sys.stdlib_module_names <= {"torch", "structure"}


def test_no_file_is_two_rooms():
    for path in files():
        assert len(path.values[0].read_text().splitlines()) <= 420, path.id


def test_importing_prints_nothing_and_parses_nothing():
    rooms = ", ".join(room for room in FLOOR if room not in SCRIPTS)
    command = [sys.executable, "-c", f"import {rooms}", "--no-such-flag"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
