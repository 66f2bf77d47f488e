"""Ctrl-C, killed processes and lost machines: one line each, and the run goes on from where it was."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.errors import in_one_line

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = ["--arch", "resnet20", "--image_size", "16", "--train_batch_size", "64"]
LOST = "imagenet.py: another process of this run was lost; --resume goes on from the last checkpoint"


def start(*words: object, **settings) -> subprocess.Popen:
    """A process in a session of its own, as a terminal gives one to a command."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, **{"env": ENVIRONMENT} | streams | settings)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def weights(job_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(job_dir / "checkpoint" / "final.pt")["state_dict"]


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ctrl_c_in_the_first_second_is_one_line(tmp_path):
    """While libraries are imported, which takes seconds. Nothing is left behind."""
    commands = {"imagenet.py": [*TINY, "--job_dir", tmp_path / "job"], "model_tune.py": ["--onnx_path", "none.onnx"]}
    processes = {name: start(name, *words) for name, words in commands.items()}
    processes |= {f"{name} later": start(name, *words) for name, words in list(commands.items())[:1]}
    time.sleep(0.6)
    for process in processes.values():
        process.send_signal(signal.SIGINT)
        time.sleep(0.4)
    for name, process in processes.items():
        told = process.communicate(timeout=60)[1]
        if name != "model_tune.py" or process.returncode != 2:  # it may have seen by then that there is no such file
            assert (process.returncode, told) == (130, f"{name.split()[0]}: stopped by Ctrl-C\n")
    assert not list(tmp_path.iterdir())


def test_errors_of_libraries_name_the_layer_and_bugs_of_ours_stay_bugs():
    class Wrong(torch.nn.Sequential):
        def forward(self, images):
            return {}["loss"]

    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(4, 8, 3))
    images = torch.zeros(1, 3, 8, 8)
    told = []
    for network in (torch.nn.Sequential(inner), Wrong()):
        try:
            network(images)
        except Exception as error:
            told.append(in_one_line(error))
    assert told[0].startswith("layer 0.1: torch says: Given groups=1, weight of size [8, 4, 3, 3]")
    assert "\n" not in told[0]
    assert told[1] is None
    import onnxruntime

    with pytest.raises(Exception, match="INVALID_PROTOBUF") as caught:
        onnxruntime.InferenceSession(b"no network")
    assert in_one_line(caught.value).startswith("onnxruntime says: ")


@pytest.fixture
def pictures(tmp_path) -> list[object]:
    """The words for a folder of noise that two processes decode."""
    chance = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 5)):
        for name in "abc":
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                picture = Image.fromarray(chance.integers(0, 255, (200, 200, 3), dtype=np.uint8))
                picture.save(tmp_path / "data" / part / name / f"{number}.png")
    return ["--data_set", "imagefolder", "--data_path", tmp_path / "data", "--workers", "2", "--train_batch_size", "20"]


@pytest.mark.slow
def test_a_killed_worker_and_ctrl_c_lose_nothing(pictures, tmp_path):
    """A process that decodes is killed; then Ctrl-C reaches all processes, and the run saves itself nonetheless."""
    words = [*TINY, *pictures, "--num_epochs", "6", "--method", "dense", "--resume", "--job_dir"]
    assert start("imagenet.py", *words, tmp_path / "undisturbed").wait() == 0
    last = tmp_path / "job" / "checkpoint" / "last.pt"
    run = start("imagenet.py", *words, tmp_path / "job")
    wait_for(last, run)
    os.kill(children(run.pid)[0], signal.SIGKILL)
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 2
    assert told.startswith("imagenet.py: a process that decodes pictures has died; --resume goes on")
    assert len(told.splitlines()) == 1
    last.rename(last.with_name("before.pt"))  # to see the next one
    run = start("imagenet.py", *words[:-2], "--resume", last.with_name("before.pt"), "--job_dir", tmp_path / "job")
    wait_for(last, run)
    time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)
    told = run.communicate(timeout=60)[1]
    assert (run.returncode, told) == (130, f"stopped; {last} is written, and --resume goes on from it\n")
    assert start("imagenet.py", *words, tmp_path / "job").wait() == 0
    assert_equal(weights(tmp_path / "job"), weights(tmp_path / "undisturbed"))


@pytest.mark.slow
def test_our_own_torchrun_restarts_and_stops_without_a_page_of_traceback(tmp_path):
    words = [*TINY, "--num_epochs", "4", "--job_dir", str(tmp_path)]
    program = f"from utils import ranks; ranks.start('imagenet.py', {words}, [0, 1])"
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "0,1"}  # it is asked for numbers of GPUs, and finds none
    for status in (0, 130):
        run = start("-c", program, env=environment)
        wait_for(tmp_path / "checkpoint" / "last.pt", run)
        if status:
            os.killpg(run.pid, signal.SIGINT)
        else:
            os.kill(children(run.pid)[-1], signal.SIGKILL)
        told = run.communicate(timeout=60)[1]
        assert run.returncode == status
        assert "Traceback" not in told
        (tmp_path / "checkpoint" / "last.pt").unlink()


def node(number: int, port: int, *words: object) -> subprocess.Popen:
    """One of two machines of a run, pretended on this one: a torchrun of its own, with one process."""
    where = ["--nnodes", "2", "--node_rank", number, "--master_addr", "127.0.0.1", "--master_port", port]
    return start("-m", "torch.distributed.run", *where, "--nproc_per_node", "1", "imagenet.py", *words)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_lose_one_and_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    """The node that is left says in one line that it lost the other, and both go on from the last checkpoint."""
    words = [*TINY, "--method", "block_l1", "--N", "4", "--num_epochs", "3", "--resume", "--job_dir"]
    for name in ("undisturbed", "disturbed"):
        last, port = tmp_path / name / "checkpoint" / "last.pt", free_port()
        nodes = [node(number, port, *words, tmp_path / name) for number in (0, 1)]
        if name == "disturbed":
            wait_for(last, nodes[0])
            for lost in (nodes[1].pid, *children(nodes[1].pid)):  # a machine without power: torchrun, too
                os.kill(lost, signal.SIGKILL)
            told = nodes[0].communicate(timeout=120)[1]
            lines = [line for line in told.splitlines() if line.startswith("imagenet.py: ")]
            assert len(lines) == 1
            assert lines[0].startswith(LOST)
            assert 'File "imagenet.py"' not in told, "no traceback of ours"
            port = free_port()
            nodes = [node(number, port, *words, tmp_path / name) for number in (0, 1)]
        for process in nodes:
            _, told = process.communicate(timeout=300)
            assert process.returncode == 0, told
    assert_equal(weights(tmp_path / "disturbed"), weights(tmp_path / "undisturbed"))
