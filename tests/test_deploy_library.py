"""deploy/: the folder that is written, other processors, other computers, the dump, and what is said when it fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tvm")
import tvm
from onnx import TensorProto, helper
from onnx import load as load_onnx
from onnx import save as save_onnx
from test_deploy import OTHER, block_weight, onnx_file, small_file

import deploy
import model_tune
from deploy import targets
from deploy.onnx import passes, reader
from deploy.runtime import folder as format
from deploy.runtime import processor, remote
from deploy.tuning import clock, measure


def tune(path: Path, *words: str) -> int:
    return model_tune.main(["--onnx_path", str(path), "--runs", "3", "--threads", "1", *words])


def written(folder: Path) -> tuple[dict, str]:
    return json.loads((folder / "deploy.json").read_text()), (folder / "deploy.md").read_text()


def test_weights_are_stored_once_and_aligned(tmp_path):
    made = deploy.compile_onnx(small_file(tmp_path / "m.onnx"), threads=1)
    made.save(tmp_path / "out")
    data, rows = (tmp_path / "out" / "weights.bin").read_bytes(), made.info["weights"]
    ends = [format.ALIGNMENT, *(end for _, _, end in rows)]
    for end, (_, start, _) in zip(ends, rows, strict=False):
        assert start % format.ALIGNMENT == 0
        assert end <= start < end + format.ALIGNMENT
    stored = [(kind, data[start:end]) for kind, start, end in rows]
    assert len(set(stored)) == len(stored)
    code = (tmp_path / "out" / "lib.so").read_bytes()
    large = [part for kind, part in stored if kind == "float32" and len(set(part)) > 16]
    assert large
    assert not any(part in code for part in large)


def is_of(library, images: np.ndarray, printed: str) -> None:
    """The example prints the five best classes of every picture, and their logits."""
    printed = np.array([line.split() for line in printed.splitlines()], np.float64).reshape(len(images), 5, 2)
    for picture, rows in zip(images, printed, strict=True):
        logits = library.run(picture[None])[0]
        assert rows[:, 0].tolist() == np.argsort(-logits)[:5].tolist()
        np.testing.assert_allclose(rows[:, 1], np.sort(logits)[::-1][:5], rtol=1e-4)


def test_the_example_in_cpp_prints_the_best_classes(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    made = deploy.compile_onnx(small_network(tmp_path / "m.onnx"), threads=1)
    made.save(tmp_path / "job" / "deploy")
    images = np.random.default_rng(0).standard_normal((3, 3, 17, 20)).astype(np.float32)
    np.save(tmp_path / "job" / "inputs.npy", images)
    example = Path(deploy.__file__).parent / "example" / "main.cc"
    head = example.read_text().split("\n\n")[1].replace("main.cc", str(example)).replace("python", sys.executable, 1)
    ran = subprocess.run(["bash", "-ec", head], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    is_of(made, images, ran.stdout)
    if "avx512bf16" in (processor.features() or ()):
        narrow = deploy.compile_onnx(tmp_path / "m.onnx", threads=1, dtype="bfloat16")
        narrow.save(tmp_path / "narrow")
        command = ["./classify", "narrow", "job/inputs.npy"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        is_of(narrow, images, ran.stdout)
    path = tmp_path / "job" / "deploy" / "deploy.json"
    info = json.loads(path.read_text())
    (kind, start, end), *rest = info["weights"]
    for damage, told in [
        ({"format_version": 2}, "format version"),
        ({"threads": 1_000_000_000}, "threads"),
        ({"build_id": "0" * 32}, "another build"),
        ({"weights": [[kind, start, end + 2**40], *rest]}, "outside"),
        ({"weights": [[kind, -64, end], *rest]}, "outside"),
        ({"files": info["files"] | {"weights.bin": {"bytes": 64}}}, "another size"),
    ]:
        path.write_text(json.dumps(info | damage))
        command = ["./classify", "job/deploy", "job/inputs.npy"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == 1, damage
        assert told in ran.stderr


def test_start_up_and_memory_are_reported(tmp_path):
    assert tune(small_file(tmp_path / "m.onnx")) == 0
    info, text = written(tmp_path / "deploy")
    start = info["start_up"]
    assert 0 < start["load_ms"] < start["first_ms"]
    assert start["peak_mib"] > 0
    assert start["weights_mib"] == round((tmp_path / "deploy" / "weights.bin").stat().st_size / 2**20, 1)
    assert "Start-up: loaded in" in text


def test_the_program_is_dumped_after_each_pass(tmp_path):
    assert tune(small_file(tmp_path / "m.onnx"), "--dump_dir", str(tmp_path / "dump")) == 0
    names = ["read_onnx", *(run.__name__ for run in passes.PASSES), "kernels", "lowering"]
    files = sorted((tmp_path / "dump").iterdir())
    assert [file.name for file in files] == [f"{i + 1:02}_{name}.txt" for i, name in enumerate(names)]
    first, last = files[0].read_text(), files[len(passes.PASSES)].read_text()
    assert "b (1, 16, 8, 8) = Affine(a; activation=('hard_swish',))" in first
    assert "b (1, 16, 8, 8) = Conv(x; activation=('hard_swish',), weight=float32[16, 8, 1, 1]" in last
    assert "T.prim_func" in files[-2].read_text()
    assert "R.vm.alloc_storage" in files[-1].read_text()


def test_a_network_of_several_outputs_gives_each_by_its_name(tmp_path):
    """Also one that other nodes read, so that it must not be computed away, and one that is only another name."""
    path = small_file(tmp_path / "m.onnx")
    model = load_onnx(path)
    model.graph.node.append(helper.make_node("Identity", ["a"], ["same"]))
    for name, rank in (("d", 2), ("same", 4)):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank))
    save_onnx(model, path)
    assert tune(path) == 0
    images = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    with deploy.load(tmp_path / "deploy") as library:
        assert library.outputs == {"y": (1, 5), "d": (1, 16), "same": (1, 16, 8, 8)}
        found, right = library.run(images), measure.peer(path, 1)(images)
    assert list(found) == ["y", "d", "same"]
    for name, values in right.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)


PICTURES = {"size": 8, "resize": 9, "interpolation": "bilinear", "crop": "center"}
PICTURES |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.5], "classes": [*"abcde"]}


def says(path: Path, pictures: object) -> Path:
    """The file, whose metadata describes its pictures."""
    model = load_onnx(path)
    del model.metadata_props[:]
    model.metadata_props.add(key="pictures", value=json.dumps(pictures))
    save_onnx(model, path)
    return path


def test_what_a_file_says_about_its_pictures_comes_back_from_the_library(tmp_path):
    for pictures in (None, PICTURES):  # a file of others says nothing
        path = small_file(tmp_path / "m.onnx")
        deploy.compile_onnx(says(path, pictures) if pictures else path, threads=1).save(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "deploy.json").read_text())["pictures"] == pictures
        assert deploy.load(tmp_path / "out").pictures == pictures


@pytest.mark.parametrize(
    "wrong", [[], {"size": 0}, {"size": True}, {"std": [1, 0, 1]}, {"mean": [0.5]}, {"crop": "top"}]
)
def test_damaged_words_about_pictures_are_refused(tmp_path, wrong):
    """They would give wrong answers without a word, or fail far from their cause."""
    path = says(small_file(tmp_path / "m.onnx"), PICTURES | wrong if wrong else wrong)
    with pytest.raises(ValueError, match="metadata 'pictures' does not describe pictures") as caught:
        reader.read_onnx(path)
    assert "\n" not in str(caught.value)


def test_every_kernel_is_profiled(tmp_path, capsys):
    """The rows of a network of one convolution: what it moves, and its rate on the kept weights alone."""
    path = small_file(tmp_path / "m.onnx", x=(1, 8, 16, 16))
    assert tune(path, "--profile") == 0
    info, text = written(tmp_path / "deploy")
    rows = info["profile"]["kernels"]
    assert [name for row in rows for name in row.get("layers", [])] == ["conv", "classifier"]
    (conv,) = [row for row in rows if row.get("layers") == ["conv"]]
    density = info["layers"][0]["density"]
    np.testing.assert_allclose(conv["gflops"] * conv["ms"] * 1e6, 2 * 16 * 8 * density * 256, rtol=0.05)
    assert conv["bytes"] >= 4 * 256 * (8 + 16)  # its input and its output
    assert all(0 < row["gflops"] < 2 * info["profile"]["peak_gflops"] for row in rows if "gflops" in row)
    assert "| kernel | ms | of all | GFLOP/s | of peak | MB | layers |" in text
    assert f"| {conv['kernel']} |" in capsys.readouterr().out
    assert deploy.load(tmp_path / "deploy").info["profile"] == info["profile"]
    assert tune(path, "--profile", "--rpc", "127.0.0.1:1") == 2


def test_a_saved_library_is_timed_with_several_callers(tmp_path, two, capsys):
    (made, _), _, _ = two
    made.save(tmp_path / "out")
    capsys.readouterr()
    assert model_tune.main(["--benchmark", str(tmp_path / "out"), "--sessions", "3", "--runs", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sessions"], found["runs"], found["batch"], found["threads"]) == (3, 20, 1, 2)
    latency = [found["latency_ms"][name] for name in ("p10", "p50", "p90", "p99")]
    assert latency == sorted(latency)
    assert 0 < found["images_per_second"] < 3 * 1000 / latency[0] * 10
    for words in (["--benchmark", str(tmp_path)], ["--benchmark"], ["--benchmark", str(tmp_path), "--sessions", "0"]):
        assert model_tune.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_help_shows_the_options_of_both_commands(capsys):
    """--sessions was told only to those who already gave --benchmark."""
    with pytest.raises(SystemExit):
        model_tune.main(["--help"])
    words = capsys.readouterr().out.split()
    assert {"--onnx_path", "--benchmark", "--sessions"} <= set(words)
    assert words.count("--runs") == 2  # in the example, and as an option of both


# the folder


def signed(info: dict) -> str:
    """A description with the digest of its contents, as somebody would write it who means harm."""
    return json.dumps(info | {"files": info["files"] | {"deploy.json": {"sha256": format.digest(info)}}})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two libraries for the same pictures, large enough for parallel loops, pictures, and the logits of each."""
    folder, shape = tmp_path_factory.mktemp("two"), (1, 8, 64, 64)
    made = [deploy.compile_onnx(small_file(folder / f"{n}.onnx", n, shape), threads=2) for n in (4, 8)]
    images = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)
    return made, images, [[library.run(picture) for picture in images] for library in made]


def test_every_flipped_bit_is_refused_or_harmless(tmp_path, two):
    """A damaged library would otherwise crash the process, or compute something else."""
    (made, _), images, (right, _) = two
    made.save(tmp_path / "out")
    random = np.random.default_rng(0)
    for path in sorted((tmp_path / "out").iterdir()):
        whole = path.read_bytes()
        for at in [0, 40, len(whole) - 1, *random.integers(len(whole), size=20)]:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(random.integers(8))]) + whole[at + 1 :])
            try:
                library = deploy.load(tmp_path / "out")
            except ValueError:
                continue
            assert path.name == "deploy.json"  # a blank between its fields, say
            np.testing.assert_array_equal(library.run(images[0]), right[0])
        for part in (b"", whole[:-1], whole + b"\0"):
            path.write_bytes(part)
            if path.name != "deploy.json" or not part:
                with pytest.raises(ValueError, match="damaged"):
                    deploy.load(tmp_path / "out")
        path.write_bytes(whole)
    deploy.load(tmp_path / "out")


def test_descriptions_that_cannot_be_right_are_refused(tmp_path, two):
    (made, _), _, _ = two
    made.save(tmp_path / "out")
    path = tmp_path / "out" / "deploy.json"
    info = json.loads(path.read_text())
    (kind, start, end), *rest = info["weights"]
    size = info["files"]["weights.bin"]["bytes"]
    for damage, told in [
        ({"format_version": 2}, "format version 2, this program reads 3: compile again"),
        ({"tvm": "0.1.0"}, r"compiled by TVM 0\.1\.0"),
        ({"threads": 1_000_000_000}, "damaged"),
        ({"threads": True}, "damaged"),
        ({"build_id": "0" * 32}, "of another build"),
        ({"build_id": "../" * 10}, "damaged"),
        ({"weights": [[kind, -64, end], *rest]}, "damaged"),
        ({"weights": [[kind, start, start + 2], *rest]}, "damaged"),
        ({"weights": [["object", start, end], *rest]}, "damaged"),
        ({"weights": [*info["weights"], [kind, size - size % 64, size + 2**40]]}, "damaged"),
        ({"input": {"name": "x", "shape": [1, 8, 8, 0]}}, "damaged"),
        ({"requires": {"architecture": "pdp11", "features": []}}, "lacks pdp11"),
        ({"weights": None}, "damaged"),
        ({"requires": None}, "damaged"),
    ]:
        path.write_text(signed(info | damage))
        with pytest.raises(ValueError, match=told) as caught:
            deploy.load(tmp_path / "out")
        assert "\n" not in str(caught.value)
    path.write_text(signed(info))
    deploy.load(tmp_path / "out")


def test_files_of_two_builds_are_no_library(tmp_path, two):
    (made, other), _, _ = two
    made.save(tmp_path / "a")
    other.save(tmp_path / "b")
    for name in ("lib.so", "weights.bin"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        shutil.copy(tmp_path / "b" / name, tmp_path / name)
        with pytest.raises(ValueError, match="of another build"):
            deploy.load(tmp_path / name)


def test_a_library_that_is_replaced_is_the_old_or_the_new_one_at_every_step(tmp_path, two, monkeypatch):
    """A kill at any of these steps leaves what is loaded here; a server that maps the old files goes on."""
    (made, other), images, (old, new) = two
    folder, seen, real = tmp_path / "out", [], os.replace
    made.save(folder)
    server = deploy.load(folder)

    def replace(*arguments):
        for step in (lambda: None, lambda: real(*arguments)):
            step()
            logits = deploy.load(folder).run(images[0])
            seen.append([np.array_equal(logits, right[0]) for right in (old, new)].index(True))
            np.testing.assert_array_equal(server.run(images[0]), old[0])

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        other.save(folder)
    assert seen == sorted(seen)
    assert {seen[0], seen[-1]} == {0, 1}
    assert sorted(path.name for path in folder.iterdir()) == ["deploy.json", "lib.so", "weights.bin"]

    stop = RuntimeError("killed")
    for after in range(len(seen) // 2):  # stopped before each of the renamings
        calls = iter([real] * after)

        def stopped(*arguments, calls=calls):
            step = next(calls, None)
            if step is None:
                raise stop
            step(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopped)
            with pytest.raises(RuntimeError, match="killed"):
                made.save(folder)
        assert deploy.load(folder).run(images[0]).shape == (1, 5)
    other.save(folder)
    np.testing.assert_array_equal(deploy.load(folder).run(images[0]), new[0])
    assert sorted(path.name for path in folder.iterdir()) == ["deploy.json", "lib.so", "weights.bin"]


# many threads


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_may_call_a_library(tmp_path, two, threads):
    """TVM's virtual machine mixes up the registers of two calls at once: wrong logits, or the end of the process."""
    made, images, right = two
    libraries = made
    if threads == 1:  # such a library's kernels run on the calling thread itself
        libraries = [
            deploy.compile_onnx(small_file(tmp_path / f"{n}.onnx", n, images[0].shape), threads=1) for n in (4, 8)
        ]
    for number, library in enumerate(libraries):
        library.save(tmp_path / str(number))
    libraries = [deploy.load(tmp_path / str(number)) for number in range(2)]
    tasks, wrong = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 0, []

    def client(number: int) -> None:
        for i in range(200):
            which, picture = (number + i) % 2, i % len(images)
            logits = libraries[which].run({"x": images[picture]} if i % 3 else images[picture])
            if not np.allclose(logits, right[which][picture], rtol=1e-5, atol=1e-5):
                wrong.append((number, i))

    for _ in range(3):
        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        client(0)
        for thread in clients:
            thread.join()
    assert not wrong
    if tasks:  # TVM's pools of threads that have ended are not collected
        most = (1 + os.cpu_count()) * os.cpu_count() if threads > 1 else 4  # those that are about to end
        assert len(os.listdir("/proc/self/task")) <= tasks + most


def test_the_caller_stays_on_its_processors(tmp_path, two):
    """TVM would move the calling thread, and its own, to all processors of the computer."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs Linux")
    (made, _), images, (right, _) = two
    made.save(tmp_path / "out")
    np.save(tmp_path / "image.npy", images[0])
    program = """
import os, sys, threading
one = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, one)  # before NumPy starts threads of its own
import numpy as np
sys.modules["torch"] = None  # which TVM would only load
import deploy
with deploy.load(sys.argv[1]) as library:
    for _ in range(2):
        logits = library.run(np.load(sys.argv[2]))
    thread = threading.Thread(target=library.run, args=(np.load(sys.argv[2]),))
    thread.start(), thread.join()
assert all(os.sched_getaffinity(int(task)) == one for task in os.listdir("/proc/self/task"))
print(logits.tolist())
child = os.fork()  # TVM's threads do not exist in a copy of the process
if child == 0:
    os._exit(deploy.load(sys.argv[1]).run(np.load(sys.argv[2])).shape != (1, 5))
assert os.waitpid(child, 0)[1] == 0
"""
    command = [sys.executable, "-c", program, str(tmp_path / "out"), str(tmp_path / "image.npy")]
    root = Path(deploy.__file__).parents[1]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(json.loads(ran.stdout), right[0], rtol=1e-5)


def test_a_library_has_names_and_an_end(tmp_path, two):
    (made, _), images, (right, _) = two
    made.save(tmp_path / "out")
    with deploy.load(tmp_path / "out") as library:
        assert library.inputs == {"x": (1, 8, 64, 64)}
        assert library.outputs == {"y": (1, 5)}
        np.testing.assert_array_equal(library.run({"x": images[0]}), right[0])
        for wrong in ({"picture": images[0]}, {}, {"x": images[0], "y": images[0]}):
            with pytest.raises(ValueError, match="input is 'x', not"):
                library.run(wrong)
    with pytest.raises(ValueError, match="closed"):
        library.run(images[0])


# other processors


def test_targets_by_any_of_their_names():
    names = ["llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a53", "raspberry-pi/4b-aarch64", "aarch64"]
    names.append('{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}')
    for name in names:
        machine = targets.find_machine(name)
        assert (machine.lanes, machine.registers) == (4, 32), name
        assert targets.find_machine(str(machine.target)).lanes == 4
    machine = targets.find_machine("llvm -mtriple=x86_64-linux-gnu -mcpu=haswell -mattr=+avx2,+fma")
    assert (machine.lanes, machine.registers) == (8, 16)
    assert targets.find_machine('{"kind": "llvm", "mcpu": "x86-64", "mtriple": "x86_64-linux-gnu"}').lanes == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("z80", "unknown"),
        ("llvm -mcpu", "unknown"),
        ("", "unknown"),
        ('{"kind": "llvm", "colour": "red"}', "unknown"),
        ("{", "unknown"),
        ("cuda", "no processor that LLVM compiles for"),
        ("llvm -mtriple=mars-linux-gnu", "no processor family 'mars'"),
        ("llvm -mcpu=z80 -mtriple=x86_64-linux-gnu", "no x86_64 processor 'z80'"),
    ],
)
def test_targets_that_do_not_exist(name, words):
    with pytest.raises(ValueError, match=words) as caught:
        targets.find_machine(name)
    assert "\n" not in str(caught.value)


def test_what_cannot_run_here_is_not_called_proven(tmp_path, capsys):
    compiler = targets.linker(targets.find_machine(OTHER))
    path = small_file(tmp_path / "m.onnx")
    if not shutil.which(compiler):
        assert tune(path, "--target", OTHER) == 2
        assert capsys.readouterr().err.endswith(f"a library for {OTHER} needs {compiler}\n")
        pytest.skip(f"linking needs {compiler}")
    assert tune(path, "--target", OTHER) == 0
    info, text = written(tmp_path / "deploy")
    assert info["measured_on"] is info["max_relative_error"] is info["top1_agreement"] is None
    assert info["latency_ms"] == info["speedup"] == {}
    assert "NOT PROVEN" in text
    assert "NOT PROVEN" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot run"):
        deploy.load(tmp_path / "deploy")


def small_network(path: Path) -> Path:
    """One of each: strided and sparse convolutions, depthwise, a residual, pooling, squeeze-excite, a classifier."""
    rng = np.random.default_rng(0)
    weights = {
        "stem": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "deep": rng.standard_normal((8, 1, 3, 3)).astype(np.float32),
        "wide": block_weight(rng, 16, 8, (1, 1), 8, 0.5, False),
        "narrow": block_weight(rng, 8, 16, (3, 3), 4, 0.5, True),
        "squeeze": block_weight(rng, 8, 8, (1, 1), 8, 0.5, False),
        "classes": rng.standard_normal((5, 8)).astype(np.float32),
    }
    n = helper.make_node
    nodes = [
        n("Conv", ["x", "stem"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]), n("Relu", ["a"], ["b"]),
        n("Conv", ["b", "deep"], ["c"], group=8, pads=[1, 1, 1, 1]), n("Conv", ["c", "wide"], ["d"]),
        n("HardSwish", ["d"], ["e"]), n("Conv", ["e", "narrow"], ["f"], pads=[1, 1, 1, 1]),
        n("Add", ["f", "b"], ["g"]), n("MaxPool", ["g"], ["h"], kernel_shape=[3, 3], strides=[2, 2]),
        n("GlobalAveragePool", ["h"], ["i"]), n("Conv", ["i", "squeeze"], ["j"]), n("HardSigmoid", ["j"], ["k"]),
        n("Mul", ["h", "k"], ["l"]), n("GlobalAveragePool", ["l"], ["m"]), n("Flatten", ["m"], ["n"]),
        n("Gemm", ["n", "classes"], ["y"], transB=1),
    ]  # fmt: skip
    return onnx_file(path, nodes, weights, (1, 3, 17, 20))


def kernel_calls(module, images: np.ndarray) -> tuple[str, bytes]:
    """The plan and the data of play.c for a program as Relax had it before lowering: its calls in order."""
    from tvm import relax

    plan, data, places = [], bytearray(), {}

    def buffer(array: np.ndarray, filled: bool) -> int:
        code, offset = "iuf".index(array.dtype.kind), len(data) if filled else -1
        plan.append(f"b {array.nbytes} {array.itemsize * 8} {code} {offset}")
        data.extend(array.tobytes() if filled else b"")
        return sum(line[0] == "b" for line in plan) - 1

    def place(value) -> int:
        return places[value] if isinstance(value, relax.Var) else buffer(value.value.numpy(), True)

    main = module["main"]
    places[main.params[0]] = buffer(images, True)
    for binding in (binding for block in main.body.blocks for binding in block.bindings):
        if not isinstance(binding.value, tvm.ir.Call):
            places[binding.var] = places[binding.value]
        elif binding.value.op.name == "relax.call_tir":
            kernel, arguments = binding.value.args[:2]
            inputs = [place(argument) for argument in arguments]
            length = int(binding.value.ty_args[0].shape[0])
            places[binding.var] = buffer(np.zeros(length, np.float32), False)
            every = [*inputs, places[binding.var]]
            plan.append(f"c __tvm_ffi_{kernel.name_hint} {len(every)} {' '.join(map(str, every))}")
        else:  # the same memory under another shape
            places[binding.var] = places[binding.value.args[1]]
    return "\n".join(plan) + "\n", bytes(data)


def test_aarch64_kernels_compute_the_same(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    missing = [name for name in (compiler, "aarch64-linux-gnu-g++", emulator) if not shutil.which(name)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    path, programs = small_network(tmp_path / "m.onnx"), {}
    graph = passes.simplify(reader.read_onnx(path))
    made = deploy.compiler.compile_graph(graph, path, "aarch64", dump=programs.__setitem__)
    made.link(tmp_path / "lib.so")
    images = np.random.default_rng(1).standard_normal((1, 3, 17, 20)).astype(np.float32)
    plan, data = kernel_calls(programs["kernels"], images)
    (tmp_path / "plan").write_text(plan)
    (tmp_path / "data").write_bytes(data)
    source = Path(__file__).parent / "play.c"
    subprocess.run([compiler, "-rdynamic", "-o", "play", source, "-ldl"], cwd=tmp_path, check=True)
    command = [emulator, "-L", "/usr/aarch64-linux-gnu", "./play", "./lib.so", "plan", "data", "out"]
    subprocess.run(command, cwd=tmp_path, check=True)
    ours = np.fromfile(tmp_path / "out", np.float32)
    theirs = measure.peer(path, 1)(images).reshape(-1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


# other computers


@contextmanager
def serving(folder: Path):
    """The address of a TVM RPC server in processes of its own; PyTorch is hidden from it, which it would only load."""
    (folder / "torch.py").write_text("raise ImportError")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--port-end", str(port + 1), "--silent"]
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, start_new_session=True
    )
    try:
        for _ in range(600):
            time.sleep(0.1)
            try:
                remote.Device(f"127.0.0.1:{port}")
                break
            except ValueError:
                assert process.poll() is None
        yield f"127.0.0.1:{port}", lambda: os.killpg(process.pid, 9)
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as (address, _):
        yield address


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_library_is_proven_and_timed_on_another_computer(tmp_path, server, dtype):
    if targets.DTYPES[dtype] - (processor.features() or frozenset()):
        pytest.skip(f"this processor does not multiply {dtype}")
    assert tune(small_file(tmp_path / "m.onnx"), "--rpc", server, "--dtype", dtype) == 0
    info, text = written(tmp_path / "deploy")
    assert (info["measured_on"], info["dtype"]) == (server, dtype)
    assert info["max_relative_error"] < {"float32": 1e-5, "bfloat16": 4 / 256}[dtype]
    assert set(info["latency_ms"]) == {"tvm_dense", "tvm_sparse"}
    assert set(info["speedup"]) == {"vs_tvm_dense"}
    assert f"Measured on {server}, by its own clock" in text


def test_kernels_are_tuned_on_another_computer(tmp_path, server, monkeypatch):
    path, file = small_file(tmp_path / "m.onnx"), tmp_path / "tuned.json"
    assert tune(path, "--rpc", server, "--tune", str(file)) == 0
    kept, text = json.loads(file.read_text()), file.read_bytes()
    assert kept["cpu"] == server  # without a key, by its address
    assert all(0 < ms < 1000 for ms in kept["times_ms"].values())
    assert 0.1 < kept["gigahertz"] < 10
    assert written(tmp_path / "deploy")[0]["tuned"] == str(file)
    monkeypatch.setattr(clock, "seconds", None)
    assert tune(path, "--rpc", server, "--tune", str(file)) == 0  # nothing is measured again
    assert file.read_bytes() == text
    file.write_text(json.dumps(kept | {"times_ms": {}}))
    assert tune(path, "--tune", str(file)) == 2  # not mixed with this computer's


def test_a_device_that_is_lost_while_tuning(tmp_path, monkeypatch, capsys):
    path, file = small_file(tmp_path / "m.onnx"), tmp_path / "tuned.json"
    with serving(tmp_path) as (address, kill):
        real = clock.seconds

        def seconds(*arguments):
            if len(arguments[1]) == 1 and file.exists():
                kill()
            return real(*arguments)

        monkeypatch.setattr(clock, "seconds", seconds)
        assert tune(path, "--rpc", address, "--tune", str(file)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert f"--rpc {address}: " in err
    assert json.loads(file.read_text())["times_ms"]  # what was measured stays


def test_a_device_that_does_not_answer(tmp_path, capsys, server):
    path = small_file(tmp_path / "m.onnx")
    cases = [(["nowhere"], "no HOST:PORT"), (["127.0.0.1:1"], "no device answers")]
    cases += [(["127.0.0.1:1", "--key", "phone"], "no device answers")]
    if shutil.which(targets.linker(targets.find_machine(OTHER))):
        cases += [([server, "--target", OTHER], f"cannot load a library for {OTHER}")]
    for words, told in cases:
        assert tune(path, "--rpc", *words) == 2
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1, err


# mistakes


def test_open_height_and_width_are_given(tmp_path):
    path = small_file(tmp_path / "m.onnx", x=(1, 8, "height", "width"))
    assert tune(path, "--image_size", "8x6") == 0
    info, _ = written(tmp_path / "deploy")
    assert info["input"]["shape"] == [1, 8, 8, 6]
    assert info["max_relative_error"] < 1e-5
    assert deploy.compile_onnx(path, image_size=(4, 4)).info["input"]["shape"] == [1, 8, 4, 4]


def test_more_mistakes_are_answered_in_one_line(tmp_path, capsys):
    good = small_file(tmp_path / "m.onnx")
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(good.read_bytes()[:-100])
    open_size = small_file(tmp_path / "size.onnx", x=(1, 8, "H", "W"))
    open_channels = small_file(tmp_path / "channels.onnx", x=(1, "C", 8, 8))
    cases = [
        (truncated, [], "not a valid ONNX file"),
        (open_size, [], "open: [1, 8, 'H', 'W']; --image_size fixes"),
        (open_channels, ["--image_size", "8"], "leaves a size of its input 'x' open"),
        (good, ["--image_size", "9"], "--image_size 9x9"),
        (good, ["--image_size", "large"], "--image_size"),
        (good, ["--image_size", "1x2x3"], "--image_size"),
        (good, ["--threads", "4096"], "--threads 4096: this computer has"),
        (good, ["--out", str(good / "below")], "--out"),
        (good, ["--out", str(good)], "--out"),
        (good, ["--dump_dir", str(good / "below")], "--dump_dir"),
        (good, ["--key", "phone"], "--rpc HOST:PORT is missing"),
    ]
    for path, words, told in cases:
        assert tune(path, *words) == 2, words
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1, err
    assert not (tmp_path / "deploy").exists()
