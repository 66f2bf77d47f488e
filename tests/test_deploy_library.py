"""deploy/: the folder that is written, other processors, other computers, the dump, and what is said when it fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("tvm")
from test_deploy import OTHER, small_file

import deploy
import model_tune
from deploy import library, passes, remote, targets


def tune(path: Path, *words: str) -> int:
    return model_tune.main(["--onnx_path", str(path), "--runs", "3", "--threads", "1", *words])


def written(folder: Path) -> tuple[dict, str]:
    return json.loads((folder / "deploy.json").read_text()), (folder / "deploy.md").read_text()


def test_weights_are_stored_once_and_aligned(tmp_path):
    made = deploy.compile_onnx(small_file(tmp_path / "m.onnx"), threads=1)
    made.save(tmp_path / "out")
    data, rows = (tmp_path / "out" / "weights.bin").read_bytes(), made.info["weights"]
    ends = [0, *(end for _, _, end in rows)]
    for end, (_, start, _) in zip(ends, rows, strict=False):
        assert start % library.ALIGNMENT == 0
        assert end <= start < end + library.ALIGNMENT
    stored = [(kind, data[start:end]) for kind, start, end in rows]
    assert len(set(stored)) == len(stored)
    code = (tmp_path / "out" / "lib.so").read_bytes()
    large = [part for kind, part in stored if kind == "float32" and len(set(part)) > 16]
    assert large
    assert not any(part in code for part in large)


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


# other computers


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A TVM RPC server in processes of its own; PyTorch is hidden from it, which it would only load."""
    folder = tmp_path_factory.mktemp("server")
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
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_library_is_proven_and_timed_on_another_computer(tmp_path, server):
    assert tune(small_file(tmp_path / "m.onnx"), "--rpc", server) == 0
    info, text = written(tmp_path / "deploy")
    assert info["measured_on"] == server
    assert info["max_relative_error"] < 1e-5
    assert set(info["latency_ms"]) == {"tvm_dense", "tvm_sparse"}
    assert set(info["speedup"]) == {"vs_tvm_dense"}
    assert f"Measured on {server}, by its own clock" in text


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
