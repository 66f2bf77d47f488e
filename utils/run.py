"""A training run: its state, and the loop that never learns what the method does."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.average import Average, statistics
from utils.ranks import Ranks


class Batches(Protocol):
    """What of a loader (`data.Loader`) a run uses."""

    epoch: int  # the position: epochs done,
    batch: int  # and batches of this epoch
    device: torch.device
    batch_size: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Steps(Protocol):
    """What of a method (`pruning.Method`) a run uses."""

    batches_per_step: int

    def optimizers(self, network: nn.Module, make: Callable) -> list[torch.optim.Optimizer]: ...
    def step(self, run: "Run", *batches: tuple[Tensor, Tensor]) -> None: ...
    def settle(self, network: nn.Module) -> None: ...
    def figures(self, network: nn.Module) -> dict[str, float]: ...


class Meter:
    """Loss and accuracy over pictures, summed on the device."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, pictures

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        count = len(labels)
        self.sums += torch.stack([loss * count, hits[:, 0].sum(), hits.sum(), loss.new_full((), count)]).double()

    def result(self, ranks: Ranks) -> dict[str, float]:
        """Mean loss, top-1 and top-5 in per cent, over the pictures of all processes."""
        loss, top1, top5, count = ranks.sum(self.sums.clone()).tolist()
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count} if count else {}


class Run:
    """Network, method, optimisers and position of one training run.

    Args:
        loader: of training batches; its `epoch` and `batch` are the run's position.
        loss: (logits, labels, images) -> mean loss of a batch.
        rate: (epoch, step, steps an epoch) -> learning rate.
        make_optimizer: parameters -> optimiser.
        ranks: the processes that share every batch.
        accumulate: batches whose mean gradient makes one update.
        amp: compute in bfloat16 where that is safe.
        ema: decay of an average of the weights (`Average`), which is evaluated and kept instead of the last ones.
        compile: by torch.compile.
    """

    def __init__(
        self,
        network: nn.Module,
        method: Steps,
        loader: Batches,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        epochs: int,
        rate: Callable[[int, int, int], float],
        make_optimizer: Callable[[list], torch.optim.Optimizer],
        ranks: Ranks | None = None,
        accumulate: int = 1,
        amp: bool = False,
        ema: float | None = None,
        compile: bool = False,
    ):
        self.network, self.method, self.loader, self.loss = network, method, loader, loss
        self.epochs, self.rate, self.amp = epochs, rate, amp
        self.ranks = ranks or Ranks()
        self.accumulate, self.batches_per_step = accumulate, method.batches_per_step * accumulate
        self.optimizers = method.optimizers(network, make_optimizer)
        self.average = Average(network, ema) if ema is not None else None
        self.model = self._parallel(compiled(network, loader.device, self.ranks, accumulate) if compile else network)
        self.meter = Meter(loader.device)
        self.iteration = 0  # steps done, or the number of the one at hand
        self.best = -math.inf  # top-1 of the best evaluation
        self._forwards = 0  # since the last update
        self._last_loss = torch.zeros(())  # on the CPU, once the event has passed
        self._arrived = torch.cuda.Event() if loader.device.type == "cuda" else None

    def _parallel(self, model: nn.Module) -> nn.Module:
        """`model` with its gradients averaged over all processes.

        Buffers are not sent along with every batch: masks follow from the weights, and are the same in all processes;
        batch-norm statistics are not, and are shared before they are used (`kept_network`).
        """
        if self.ranks.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    @property
    def epoch(self) -> int:
        return self.loader.epoch

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1."""
        return (self.epoch + self.loader.batch / len(self.loader)) / self.epochs

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch; its figures go into the meter."""
        self._forwards += 1
        with self._exchange(), torch.autocast(self.loader.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.model(images)
            if self.amp:
                logits = logits.float()
            loss = self.loss(logits, labels, images)  # here, since a teacher computes under autocast, too
        self.meter.add(loss.detach(), logits.detach(), labels)
        self._last_loss = loss.detach().to("cpu", non_blocking=True)
        if self._arrived:
            self._arrived.record()
        return loss

    def _exchange(self) -> contextlib.AbstractContextManager:
        """The gradients of a forward pass in this context are averaged over the processes if an update may follow.

        That is so from the last of the accumulated batches on. Before, every process adds up its own.
        """
        wait = self.ranks.world > 1 and self._forwards < self.accumulate
        return self.model.no_sync() if wait else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, *optimizers: torch.optim.Optimizer) -> None:
        """A step of `optimizers`, by default all; gradients are gone then, those of the others too.

        At least `accumulate` forward passes come before: the last of them makes the gradients those of all processes.
        """
        assert self.ranks.world == 1 or self._forwards >= self.accumulate, "an update by gradients of one process"
        for optimizer in optimizers or self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._forwards = 0

    def step(self, *batches: tuple[Tensor, Tensor]) -> None:
        self.network.train()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                rate = self.rate(self.epoch, self.loader.batch - 1, len(self.loader))
                group["lr"] = rate * group.get("lr_scale", 1.0)
        self.check_finite()  # of the step before: asking for this one's loss would make a GPU wait
        self.iteration += 1
        self.method.step(self, *batches)
        if self.average:
            self.average.update(self.iteration)

    def kept_network(self) -> nn.Module:
        """The network to evaluate and to keep, which obeys the method: the live one, or the average beside it.

        All processes call this. Each has gathered batch-norm statistics from its own pictures; those of the first
        process count, so that a run resumed from its checkpoint goes on as if it had not stopped.
        """
        self.method.settle(self.network)  # with an average, too, so that having one does not change the training
        kept = self.network
        if self.average:
            kept = self.average.network()
            self.method.settle(kept)
        self.ranks.share(statistics(kept))
        return kept

    def check_finite(self) -> None:
        """Raise ValueError if the loss of the last forward pass is not a finite number."""
        if self._arrived:
            self._arrived.synchronize()
        if not math.isfinite(self._last_loss):
            raise ValueError(
                f"the loss of iteration {self.iteration} is {float(self._last_loss)}: stopped; "
                "the last good checkpoint stands; a smaller --lr may help"
            )

    def state_dict(self) -> dict:
        """All that a resumed run needs. `state_dict` in it is of the network to keep; `live` is of the one in training,
        where that is another one."""
        self.check_finite()
        rng = {"cpu": torch.get_rng_state()}
        if self.loader.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.loader.device)
        return {
            "state_dict": (self.average.network() if self.average else self.network).state_dict(),
            "live": self.network.state_dict() if self.average else None,
            "averaged_since": self.average.since if self.average else 0,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loader": self.loader.state_dict(),
            "iteration": self.iteration,
            "best": self.best,
            "meter": self.meter.sums.tolist(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. Raises ValueError if it is not of this kind of run."""
        if bool(state.get("live")) != bool(self.average):
            raise ValueError("--resume: the checkpoint was made with another --ema")
        try:
            self.network.load_state_dict(state["live" if self.average else "state_dict"])
            if self.average:
                self.average.copy.load_state_dict(state["state_dict"])
                self.average.since = state.get("averaged_since", 0)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.loader.load_state_dict(state["loader"])
            self.iteration, self.best = state["iteration"], state["best"]
            self.meter.sums.copy_(torch.tensor(state["meter"], dtype=torch.float64))
            torch.set_rng_state(state["rng"]["cpu"])
            if "cuda" in state["rng"] and self.loader.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.loader.device)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"--resume: not a checkpoint of this run ({' '.join(str(error).split())[:200]})") from None


def compiled(network: nn.Module, device: torch.device, ranks: Ranks, accumulate: int) -> nn.Module:
    """`network` by torch.compile, which on a GPU launches a whole pass as one CUDA graph, as small networks need most.

    A graph's results lie in memory of its own, which the next pass overwrites: a step by one batch, and BiP's two steps
    in turn, have used their gradients up by then. Gradients that several batches add up have not, and those that are
    exchanged between processes are not known to: there, kernels are launched one by one.
    """
    graphs = device.type == "cuda" and ranks.world == accumulate == 1
    return torch.compile(network, mode="reduce-overhead" if graphs else "default", dynamic=False)


def fit(run: Run, callbacks: list) -> None:
    """Train `run` to its end. Callbacks are told `after_step(run)` and `after_epoch(run, results)`."""
    while run.epoch < run.epochs:
        began, done, batches = time.perf_counter(), run.iteration, []
        for batch in run.loader:
            batches.append(batch)
            if len(batches) < run.batches_per_step:
                continue
            run.step(*batches)
            batches = []
            for callback in callbacks:
                callback.after_step(run)
        run.check_finite()
        results = {"train": run.meter.result(run.ranks)}  # callbacks add to it, and see what those before them added
        images = (run.iteration - done) * run.batches_per_step * run.loader.batch_size
        results["train"]["images_per_second"] = images / (time.perf_counter() - began)
        run.meter = Meter(run.loader.device)
        for callback in callbacks:
            callback.after_epoch(run, results)


@torch.no_grad()
def evaluate(network: nn.Module, loader: Batches, ranks: Ranks | None = None) -> dict[str, float]:
    """Loss, top-1 and top-5 (per cent) over all pictures of `loader`, each once, whichever process has it."""
    network.eval()
    meter = Meter(loader.device)
    for images, labels in loader:
        logits = network(images)
        meter.add(F.cross_entropy(logits, labels), logits, labels)
    return meter.result(ranks or Ranks())
