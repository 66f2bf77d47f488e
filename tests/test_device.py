"""The CUDA path on a pretended GPU: every method trains, finishes and exports there, and the host seldom waits."""

import os
import threading

import pytest
import torch
import torch.distributed.run
from pretended_device import DEVICE, DeviceTensor, PretendedGPU
from torch import Tensor, nn

import data
import models
import pruning
from data.loader import ResidentLoader
from pruning.groups import blocks_intact
from utils import machine
from utils import ranks as joining
from utils.export import export_onnx
from utils.loss import Loss
from utils.ranks import Ranks
from utils.run import Run, compiled, evaluate

# Where the host waits for the GPU within a step -> why it may.
DECLARED = {
    "utils/run.py check_finite: event": "the loss of the step before: that forward pass is over, its update still runs",
}
# Operators that a step launches at most, on ResNet-20 in bfloat16: a little more than was counted.
OPERATORS = dict.fromkeys(pruning.METHODS, 250) | {"bip": 745, "hydra": 375, "resrep": 365, "stripe": 375}


@pytest.fixture(autouse=True)
def one_thread():
    """Operators this small are slower in several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(device: torch.device = DEVICE) -> ResidentLoader:
    images, labels = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8), torch.arange(40) % 10
    return ResidentLoader(images, labels, [*"abcdefghij"], 4, True, 0, device, pad=4, flip=True)


def run_of(name: str, **settings) -> Run:
    """As imagenet.py trains ResNet-20: bfloat16, channels_last, a fused optimiser, an average of the weights."""
    network = models.create_model("resnet20", 10).to(DEVICE, memory_format=torch.channels_last)
    method = pruning.create_method(name)
    method.attach(network)

    def make(parameters):
        return torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=True)

    settings = {"loss": Loss(), "amp": True, "ema": 0.9} | settings
    return Run(network, method, pictures(), epochs=2, rate=lambda *_: 0.01, make_optimizer=make, **settings)


def steps(run: Run, gpu: PretendedGPU, count: int = 2) -> None:
    """Afterwards `gpu` has counted the last of them: drawing its batches and training on them."""
    batches = iter(run.loader)
    for _ in range(count):
        gpu.reset()
        run.step(*[next(batches) for _ in range(run.batches_per_step)])


@pytest.mark.parametrize("name", pruning.METHODS)
def test_every_method_works_on_a_gpu(name: str):
    """Catches tensors left on the CPU, new waits of the host, and steps of many small operators."""
    with PretendedGPU() as gpu:
        run = run_of(name)
        steps(run, gpu)
        assert gpu.waits.keys() <= DECLARED.keys()
        assert gpu.operators <= OPERATORS[name]
        images = next(iter(run.loader))[0]
        network = run.kept_network()
        kept = pruning.finish(run.method, network, images)
        lengths = {name: layer.N for name, layer in kept.items() if layer.in_blocks}
        network, refused = pruning.proven_copy(network, lambda copy: pruning.gather_blocks(copy, lengths), images)
        assert all(blocks_intact(network.get_submodule(layer).weight.cpu(), N) for layer, N in lengths.items())
        assert not refused
        assert all(isinstance(parameter, DeviceTensor) for parameter in network.parameters())


def test_a_network_on_a_gpu_is_exported(tmp_path):
    with PretendedGPU():
        network = models.create_model("resnet20", 10).to(DEVICE, memory_format=torch.channels_last).eval()
        assert export_onnx(network, next(iter(pictures()))[0], tmp_path / "model.onnx") < 1e-5


def test_a_run_on_a_gpu_resumes():
    with PretendedGPU() as gpu:
        run, other = run_of("block_l1"), run_of("block_l1")
        steps(run, gpu)
        other.load_state_dict(run.state_dict())
        state = run.network.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.network.state_dict().items())


def test_a_loss_that_is_not_finite_is_seen_a_step_later():
    with PretendedGPU() as gpu:
        run = run_of("dense", loss=lambda logits, *_: logits.sum() * torch.inf)
        steps(run, gpu, 1)
        with pytest.raises(ValueError, match="the loss of iteration 1 is"):
            steps(run, gpu, 1)


def test_an_evaluation_waits_as_often_for_ten_batches_as_for_one():
    """Only the epoch's indices are sent to the GPU, and the sums read from it."""
    waits = []
    with PretendedGPU() as gpu:
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).to(DEVICE)
        for limit in (1, 10):
            loader = pictures()
            loader.train, loader.limit = False, limit
            gpu.reset()
            evaluate(network, loader)
            waits.append(dict(gpu.waits))
    assert waits[0] == waits[1]
    assert sum(waits[0].values()) == 4


class Layer(nn.Linear):
    """Notes in what precision and mode it computes."""

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x.flatten(1))
        self.seen = result.dtype, torch.is_inference(result)
        return result


def test_a_teacher_computes_in_the_precision_of_the_student_and_in_inference():
    teacher = Layer(3 * 32 * 32, 10)
    loader = pictures(torch.device("cpu"))

    def make(parameters):
        return torch.optim.SGD(parameters, 0.01)

    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    loss = Loss(0.0, teacher, 0.5)
    run = Run(network, pruning.create_method("dense"), loader, loss, 1, lambda *_: 0.01, make, amp=True)
    run.step(next(iter(loader)))
    assert teacher.seen == (torch.bfloat16, True)
    assert teacher.weight.grad is None


class TF32Linear(nn.Linear):
    """Computes as a GPU does by default: float32 is rounded to a mantissa of ten bits."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return nn.functional.linear(x.half().float(), self.weight.half().float(), self.bias)
        return super().forward(x)


def test_a_proof_is_not_at_the_mercy_of_tf32():
    network = nn.Sequential(TF32Linear(64, 32, bias=False), TF32Linear(32, 10, bias=False))

    def moved(copy: nn.Sequential) -> str:
        copy[0].weight.data *= 1 / 3
        copy[1].weight.data *= 3
        return "told"

    images = torch.randn(8, 64)
    copied, told = pruning.proven_copy(network, moved, images, tolerance=1e-6)
    assert told == "told"
    assert not torch.allclose(copied(images), network(images), rtol=1e-5, atol=0), "in TF32 the two differ"
    assert {p.dtype for n in (network, copied) for p in n.parameters()} == {torch.float32}

    def broken(copy: nn.Sequential) -> None:
        copy[1].weight.data[0] *= 1.01

    with pytest.raises(ValueError, match="broken changed the network's outputs by"):
        pruning.proven_copy(network, broken, images)


def test_a_network_that_computes_zeros_is_proven_and_said_to():
    """0/0 must not pass for a difference, nor a difference from zero for none."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    images = torch.randn(2, 3, 2, 2)
    with pytest.warns(UserWarning, match="all outputs of the network are 0"):
        pruning.finish(pruning.create_method("dense"), network, images)
    with pytest.raises(ValueError, match=r"<lambda> changed the network's outputs by 1\.0e\+00"):
        pruning.proven_copy(network, lambda copy: nn.init.ones_(copy[1].bias), images)


# --- which GPU ------------------------------------------------------------------------------------------------------


def test_the_picked_gpu_is_the_current_one_and_convolutions_are_tried_out(monkeypatch):
    """Events and streams are the current device's: an event on GPU 0 would not wait for work on GPU 1."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with PretendedGPU(2):
        assert machine.pick_device(1)[0] == torch.device("cuda", 1)
        assert torch.cuda.current_device() == 1
        assert torch.backends.cudnn.benchmark
        with pytest.raises(ValueError, match="--gpus 2: this machine has 2"):
            machine.pick_device(2)


def test_joining_processes_take_a_gpu_each(monkeypatch):
    """Else the flag that stops a run lies on GPU 0 in all of them, where NCCL refuses to exchange it."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    with PretendedGPU(2), joining.join() as here:
        assert torch.cuda.current_device() == 1
        assert here.device == torch.device("cuda", 1)
    with PretendedGPU(1), pytest.raises(ValueError, match=r"process 1 .* has no GPU: there are 1"), joining.join():
        pass


@pytest.mark.parametrize(("visible", "chosen"), [(None, "0,2"), ("4,5,7", "4,7"), ("GPU-a,GPU-b,GPU-c", "GPU-a,GPU-c")])
def test_gpus_are_numbered_among_the_visible_ones(visible: str | None, chosen: str, monkeypatch):
    started = []
    monkeypatch.setattr(torch.distributed.run, "main", started.extend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that what `start` sets is undone
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with PretendedGPU(3):
        with pytest.raises(SystemExit) as end:
            joining.start("imagenet.py", ["--gpus", "0", "2", "--resume", "old.pt"], [0, 2])
        assert end.value.code == 0
        assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen
        assert started[-2:] == ["--resume", "old.pt"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        with pytest.raises(ValueError, match="--gpus 3: there are 3, numbered from 0"):
            joining.start("imagenet.py", [], [0, 3])


def test_dali_decodes_on_the_gpu_of_its_process(tmp_path, monkeypatch):
    """DALI takes the current GPU of the thread that calls it, and a new thread starts with GPU 0."""
    from PIL import Image

    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / part / "cat" / "grey.png")
    asked = {"data_path": tmp_path, "image_size": 16, "train_batch_size": 1, "eval_batch_size": 1, "seed": 0}
    with PretendedGPU(2):
        device = torch.device("cuda", 1)
        train, _ = data.create_loaders("imagefolder", **asked, device=device, workers=0, skip_bad=False, use_dali=True)
        used = []

        def batch(numbers: list[int]) -> tuple[Tensor, Tensor]:
            used.append((torch.cuda.current_device(), threading.current_thread() is threading.main_thread()))
            return torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)

        monkeypatch.setattr(train, "_batch", batch)
        list(train)
    assert used == [(1, False)]


@pytest.mark.parametrize(
    ("device", "world", "accumulate", "mode"),
    [("cuda", 1, 1, "reduce-overhead"), ("cuda", 2, 1, "default"), ("cuda", 1, 2, "default"), ("cpu", 1, 1, "default")],
)
def test_a_compiled_pass_is_one_graph_where_nothing_outlives_it(device, world, accumulate, mode, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **settings: settings)
    settings = compiled(nn.Identity(), torch.device(device), Ranks(0, world), accumulate)
    assert settings == {"mode": mode, "dynamic": False}


# --- the pretended GPU itself ---------------------------------------------------------------------------------------


def test_the_pretended_gpu_notices_what_a_real_one_would():
    with PretendedGPU() as gpu:
        there, here = torch.arange(4.0, device="cuda"), torch.arange(4.0)
        assert there.device == DEVICE
        assert (there + there).is_cuda
        for mixed in (lambda: there + here, lambda: here[there.long()], lambda: torch.stack([here, there])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        waiting = {
            "_local_scalar_dense": lambda: float(there[0]),
            "index": lambda: there[there > 1],
            "masked __setitem__": lambda: there.__setitem__(there > 1, 0),
            "index_put_": lambda: there.__setitem__(there > -1, 2 * there),
            "copy to": lambda: here.to("cuda", non_blocking=True),  # not from pinned memory
            "copy from": lambda: there.cpu(),
            "tensor": lambda: torch.tensor(3.0, device=DEVICE),
            "new_tensor": lambda: there.new_tensor(3.0),
            "list": lambda: there[[0, 2]],
            "tolist": lambda: there.tolist(),
        }
        for what, ask in waiting.items():
            gpu.reset()
            ask()
            assert any(what in wait for wait in gpu.waits), what  # torch 2.11 makes two operators of one assignment
        gpu.reset()
        for silent in (lambda: there * 2, lambda: there.new_full((), 3.0), lambda: there[1:3], lambda: there.double()):
            silent()
        assert not gpu.waits
        assert gpu.operators == 3, "a view launches nothing"


def test_a_copy_that_was_not_waited_for_has_not_arrived():
    with PretendedGPU():
        copy = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
        assert copy.isnan().all()
        torch.cuda.Event().synchronize()
        assert copy.tolist() == [1, 1]
