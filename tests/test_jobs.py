"""The folder of a run, and what a checkpoint says about itself: nothing is lost or mistaken for something else."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import imagenet
from jobs.pictures import create_loaders
from utils.files import LOCK, NotWritten, atomic, locked, save_checkpoint, sha256
from utils.ranks import Ranks
from utils.report import screen

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--arch", "resnet20", "--image_size", "8", "--train_batch_size", "256", "--lr", "0.1"]
DENSE = [*TINY, "--method", "dense"]


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pictures(folder: Path, classes: str, count: int = 4) -> Path:
    """A train/ val/ tree of `count` grey pictures of every class."""
    for part in ("train", "val"):
        for shade, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (10, 10), 50 * shade + number).save(folder / part / name / f"{number}.png")
    return folder


def of_folder(folder: Path) -> list[str]:
    return ["--data_set", "imagefolder", "--data_path", str(folder), "--workers", "0", "--train_batch_size", "4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of blocks of 4 on the classes a, b, c."""
    data, job_dir = pictures(tmp_path_factory.mktemp("abc"), "abc"), tmp_path_factory.mktemp("finished")
    words = [*TINY, *of_folder(data), "--method", "block_l1", "--N", "4", "--num_epochs", "1"]
    imagenet.main([*words, "--job_dir", str(job_dir)])
    (job_dir.parent / "words.json").write_text(json.dumps(words))
    return job_dir


@pytest.fixture
def words(finished: Path) -> list[str]:
    """The command line of `finished`, without its folder."""
    return json.loads((finished.parent / "words.json").read_text())


# The lock


def test_a_folder_belongs_to_one_process_and_a_killed_one_leaves_no_lock(tmp_path):
    """A child of the owner, as those that decode pictures, does not keep the lock when the owner is killed."""
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom utils.files import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    if os.fork(): print(flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children")
    owner.stdout.readline()
    [child] = map(int, children.read_text().split())
    try:
        before = content(tmp_path)
        with pytest.raises(ValueError, match=rf"is in use by process {owner.pid} on .*: a folder belongs to one run"):
            imagenet.main([*DENSE, "--num_epochs", "0", "--job_dir", str(tmp_path)])
        assert content(tmp_path) == before
        owner.kill()
        owner.wait()
        with locked(tmp_path):
            pass
        assert not (tmp_path / LOCK).exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_that_is_removed_while_one_waits_for_it_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it, its owner may remove it: another process would lock a new file."""
    taken = []
    lock = fcntl.lockf

    def late(handle: int, how: int) -> None:
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(handle)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert len(taken) == 2


def test_a_start_from_the_run_that_would_be_moved_aside_is_refused(finished: Path, words):
    """The same command with --resume would not find the file any more."""
    before = content(finished)
    with pytest.raises(ValueError, match="which a new run moves aside: another --job_dir"):
        start = ["--pretrained_model", str(finished / "checkpoint" / "final.pt")]
        imagenet.main([*words, *start, "--job_dir", str(finished)])
    assert content(finished) == before


def test_a_start_that_fails_leaves_no_new_folder(tmp_path):
    with pytest.raises(ValueError, match="needs --data_path"):
        imagenet.main(["--data_set", "imagefolder", "--num_epochs", "0", "--job_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


# No space


def test_a_full_disk_is_told_with_the_path_and_what_is_safe(tmp_path):
    """By a limit for the size of files, which the kernel enforces at the same place: within torch's own writer, too."""
    program = (
        "import sys, torch\nfrom pathlib import Path\nimport resource\n"
        "from utils.files import save_checkpoint\nfrom utils.errors import answer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "save = lambda name: save_checkpoint(Path(sys.argv[1]) / name, {'weights': torch.zeros(100_000)})\n"
        "sys.exit([answer('program', lambda: save(name)) for name in ('last.pt', 'best.pt')] != [2, 2])\n"
    )
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    reason = "could not be written: no space left for a file of this size (file too large);"
    assert done.stderr.splitlines() == [
        f"program: {tmp_path}/last.pt {reason} what was there before is unchanged",
        f"program: {tmp_path}/best.pt {reason} no part of it was left behind",
    ]
    assert os.listdir(tmp_path) == ["last.pt"]
    assert torch.load(tmp_path / "last.pt")["epoch"] == 1


def test_no_space_is_found_behind_what_a_library_says(tmp_path):
    """TVM hides what the linker has printed in an error of its own, which hides it once more."""
    with (
        pytest.raises(NotWritten, match=r"a\.bin could not be written: no space left on the device"),
        atomic(tmp_path / "a.bin"),
    ):
        try:
            raise RuntimeError("ld: final link failed: No space left on device")
        except RuntimeError as error:
            raise ValueError("lib.so could not be linked: a compiler is missing") from error
    assert not os.listdir(tmp_path)


# One network a folder


def test_an_evaluation_that_exports_reports_what_it_exports(finished: Path, words, tmp_path):
    """The report of this very network stays; that of another one is moved aside with all that hangs on it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "deploy").mkdir()
    data = words[words.index("--data_path") + 1]
    run = [*of_folder(Path(data)), "--export_onnx", "--job_dir", str(tmp_path)]
    imagenet.main([*run, "--evaluate", str(tmp_path / "checkpoint" / "final.pt")])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["onnx_sha256"] == sha256(tmp_path / "model.onnx")
    assert summary["checkpoint"]["sha256"] == sha256(tmp_path / "checkpoint" / "final.pt")
    assert summary["layers"][1]["rate"] == 0.5, "as only the run that pruned it knows"
    assert not (tmp_path / "earlier.1").exists()
    best = tmp_path / "checkpoint" / "best.pt"
    imagenet.main([*run, "--evaluate", str(best)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["checkpoint"] == {"file": str(best), "sha256": sha256(best)}
    assert summary["onnx_sha256"] == sha256(tmp_path / "model.onnx")
    assert {path.name for path in (tmp_path / "earlier.1").iterdir()} >= {"summary.json", "model.onnx", "deploy"}
    assert best.exists()


def test_what_is_asked_and_not_reached_is_said_last_and_stands_in_the_report(tmp_path, capsys):
    """Here the sparsity was to grow with training, of which there is none."""
    imagenet.main([*TINY, "--schedule", "cubic", "--num_epochs", "0", "--job_dir", str(tmp_path)])
    last = capsys.readouterr().out.splitlines()[-1]
    [sentence] = json.loads((tmp_path / "summary.json").read_text())["not_reached"]
    assert last == f"NOT REACHED: {sentence}"
    assert f"**Not reached:** {sentence}" in (tmp_path / "summary.md").read_text()


# What a checkpoint says about itself


def test_what_is_not_given_comes_from_the_evaluated_file(finished: Path, words, capsys):
    """Network, picture size, block length and method; a contradiction is refused."""
    data = words[words.index("--data_path") + 1]
    for name in ("final.pt", "last.pt"):
        file = str(finished / "checkpoint" / name)
        imagenet.main([*of_folder(Path(data)), "--evaluate", file])
        assert "1x4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--image_size 16: .*last\.pt was trained on pictures of 8x8"):
        imagenet.main([*of_folder(Path(data)), "--image_size", "16", "--evaluate", file])
    with pytest.raises(ValueError, match="resnet20"):
        imagenet.main([*of_folder(Path(data)), "--arch", "resnet32", "--evaluate", file])


def test_a_method_of_scores_need_not_be_named_again(tmp_path, capsys):
    """Only Hydra, with its own options, makes a dense network of a checkpoint from the middle of its run."""
    run = [*TINY, "--method", "hydra", "--k", "0.3", "--num_epochs", "0", "--job_dir", str(tmp_path)]
    imagenet.main(run)
    imagenet.main(["--evaluate", str(tmp_path / "checkpoint" / "last.pt")])
    assert "sparsity 70.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("bcd", "only the file has a and only the data has d"),
        ("ab", "only the file has c"),
        ("abcdefghij", "only the data has d, e, f, g, h"),
    ],
)
def test_other_classes_are_refused(finished: Path, words, tmp_path, classes: str, message: str):
    """Evaluated, they would be right in 0 % of the pictures; resumed, the file would name the wrong ones."""
    data = of_folder(pictures(tmp_path, classes))
    file = str(finished / "checkpoint" / "last.pt")
    with pytest.raises(ValueError, match=rf"last\.pt: does not fit resnet20: .*{message}"):
        imagenet.main([*data, "--evaluate", file])
    with pytest.raises(ValueError, match=rf"--resume: the data has changed: .*{message}; .*--accept_changed_data"):
        imagenet.main([*words, *data, "--resume", file, "--job_dir", str(tmp_path / "job")])


def test_other_classes_get_a_classifier_of_their_own(finished: Path, tmp_path, capsys):
    data = of_folder(pictures(tmp_path, "bcd"))
    start = ["--pretrained_model", str(finished / "checkpoint" / "final.pt"), "--num_epochs", "0"]
    imagenet.main([*data, "--image_size", "8", *start, "--job_dir", str(tmp_path / "job")])  # the file says resnet20
    assert "its classifier linear of 3 classes is left out: one of 3 starts anew" in capsys.readouterr().out


def test_another_order_of_classes_and_another_normalisation_are_refused(finished: Path, words, tmp_path):
    state = torch.load(finished / "checkpoint" / "final.pt")
    data = of_folder(Path(words[words.index("--data_path") + 1]))
    for changed, message in (
        ({"classes": ["a", "c", "b"]}, "number 1 is c in the file, b in the data"),
        ({"mean": [0.5, 0.5, 0.5]}, r"normalised by mean \[0\.5, 0\.5, 0\.5\], not \[0\.485"),
    ):
        torch.save(state | changed, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message):
            imagenet.main([*data, "--evaluate", str(tmp_path / "other.pt")])


def test_a_resumed_run_knows_its_pictures(finished: Path, words, tmp_path):
    """Wherever their folder stands; one that is missing, renamed or of another size is told."""
    job_dir, data = tmp_path / "job", tmp_path / "data"
    shutil.copytree(finished, job_dir)
    shutil.copytree(words[words.index("--data_path") + 1], data)
    resume = [*words, "--data_path", str(data), "--job_dir", str(job_dir), "--resume"]
    imagenet.main(resume)
    assert not (job_dir / "earlier.1").exists()
    one = data / "train" / "a" / "1.png"
    one.rename(one.with_name("9.png"))
    with pytest.raises(ValueError, match="train has as many pictures, but some have other names or sizes"):
        imagenet.main(resume)
    one.with_name("9.png").rename(one)
    (data / "val" / "c" / "2.png").unlink()
    before = content(job_dir)
    with pytest.raises(ValueError, match="the data has changed: val had 12 pictures and has 11; --accept_changed_data"):
        imagenet.main(resume)
    assert content(job_dir) == before
    imagenet.main([*resume, "--accept_changed_data"])


def test_a_finished_network_is_no_run_to_go_on_with(finished: Path, words, tmp_path):
    with pytest.raises(ValueError, match=r"final\.pt holds a network, but not the state of a run"):
        imagenet.main([*words, "--resume", str(finished / "checkpoint" / "final.pt"), "--job_dir", str(tmp_path)])


# Pictures that do not make a step


def test_fewer_batches_than_a_step_needs_are_refused_before_training(tmp_path):
    data = of_folder(pictures(tmp_path / "data", "ab"))
    run = [*TINY, *data, "--num_epochs", "1", "--job_dir", str(tmp_path / "job")]
    for own, message in (
        (
            ["--method", "bip", "--train_batch_size", "8"],
            "8 pictures make 1 batches of 8, .* takes 2",
        ),
        (["--method", "dense", "--accumulate", "4"], "make 2 batches of 4, .* takes 4: lower .*--accumulate"),
    ):
        with pytest.raises(ValueError, match=message):
            imagenet.main([*run, *own])
    assert not (tmp_path / "job").exists()


def test_pictures_left_over_in_every_epoch_are_said(tmp_path, capsys):
    data = of_folder(pictures(tmp_path / "data", "ab"))
    imagenet.main([*TINY, *data, "--train_batch_size", "3", "--num_epochs", "1", "--job_dir", str(tmp_path / "job")])
    assert "every epoch leaves out 2 of 8 training pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (["--train_batch_size", "9"], 9, "8 pictures in a training batch: too few for 9 processes"),
        (
            ["--train_batch_size", "4", "--eval_batch_size", "1"],
            2,
            "--eval_batch_size 1: 2 processes share",
        ),
    ],
)
def test_fewer_pictures_than_processes_are_refused(words: list[str], world: int, message: str, tmp_path):
    options = imagenet.parse([*TINY, *of_folder(pictures(tmp_path, "ab")), *words])
    with pytest.raises(ValueError, match=message):
        create_loaders(options, torch.device("cpu"), Ranks(0, world), screen(quiet=True))
