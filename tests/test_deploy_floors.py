"""The floors inside deploy/: a room imports only rooms below it, and no two files import each other.

python tests/test_deploy_floors.py [FOLDER] prints how many imports there are, by file and by room.
"""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
FLOORS = [
    {"runtime", "dump"},
    {"targets", "onnx"},
    {"kernels"},
    {"plan"},
    {"codegen"},
    {"tuning", "quantise", "accuracy"},
    {"peers"},
    {"report", "compiler", "proof"},
    {"__init__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path, root: Path) -> str:
    """A file's name as an import spells it, from deploy/ on: kernels.emit; a package is its __init__."""
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports_by_file(root: Path) -> dict[str, set[str]]:
    """The modules of `root` that each of its modules imports, anywhere in the file."""
    names = {module_of(path, root) for path in root.glob("**/*.py")}
    found = {}
    for path in sorted(root.glob("**/*.py")):
        package, targets = module_of(path, root).split(".")[:-1], set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == root.name:
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                parts = [part for part in base if part]
                choices = [".".join([*parts, alias.name]), ".".join(parts), ".".join([*parts, "__init__"])]
                targets |= {next(name for name in choices if name in names)}
        found[module_of(path, root)] = targets
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


def arrows(found: dict[str, set[str]]) -> Counter:
    """How many files of a room import from another room, by (room, other room)."""
    pairs = ((room_of(module), room_of(target)) for module, targets in found.items() for target in targets)
    return Counter((here, there) for here, there in pairs if here != there)


def test_rooms_import_only_rooms_below_them():
    upward = [pair for pair in arrows(imports_by_file(DEPLOY)) if FLOOR[pair[0]] <= FLOOR[pair[1]]]
    assert not upward


def test_no_two_files_import_each_other():
    graphlib.TopologicalSorter(imports_by_file(DEPLOY)).prepare()  # raises CycleError


def test_an_arrow_upward_or_a_cycle_would_be_found(tmp_path):
    """The two tests above are worth nothing if imports inside of functions, or with dots, are overlooked."""
    for room in ("runtime", "plan"):
        (tmp_path / "deploy" / room).mkdir(parents=True)
    (tmp_path / "deploy" / "runtime" / "library.py").write_text("def f():\n    from ..plan import layout\n")
    (tmp_path / "deploy" / "plan" / "layout.py").write_text("from deploy.runtime.library import f\n")
    found = imports_by_file(tmp_path / "deploy")
    assert arrows(found) == {("runtime", "plan"): 1, ("plan", "runtime"): 1}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(found).prepare()


def test_the_runtime_needs_only_numpy_and_tvm():
    known = sys.stdlib_module_names | {"numpy", "tvm", "tvm_ffi"}
    for path in (DEPLOY / "runtime").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= known, path


def test_importing_deploy_loads_no_compiler():
    program = "import sys, deploy; print(*({'torch', 'tvm', 'onnx', 'rich'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=DEPLOY.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else DEPLOY
    found = imports_by_file(root)
    lines = Counter()
    for path in root.glob("**/*.py"):
        lines[room_of(module_of(path, root))] += len(path.read_text().splitlines())
    order = list(graphlib.TopologicalSorter(found).static_order())
    depth: dict[str, int] = {}
    for module in order:
        depth[module] = 1 + max((depth[target] for target in found[module]), default=0)
    between = arrows(found)
    print(f"{len(found)} files, {sum(map(len, found.values()))} imports between files, {max(depth.values())} deep")
    print(f"{len(lines)} rooms, {len(between)} arrows between rooms, {sum(lines.values())} lines")
    for room in sorted(lines, key=lambda room: (FLOOR.get(room, 0), room)):
        below = ", ".join(sorted(there for here, there in between if here == room))
        print(f"{room:9} {lines[room]:5} lines  -> {below}")


if __name__ == "__main__":
    main()
