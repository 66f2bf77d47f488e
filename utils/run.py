"""A training run: its state, and the loop that never learns what the method does."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def learning_rate(policy: str, base: float, epoch: int, epochs: int, warmup: int, step: int, steps: int) -> float:
    """The rate of step `step` (of `steps`) of `epoch`. As published, only the warm-up is finer than epochs."""
    if policy == "cos":
        rate = 0.5 * base * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
    elif policy == "step":
        rate = base * 0.1 ** (epoch // 30 + (epoch >= 80))
    elif policy == "exp":
        rate = base * 0.96**epoch
    else:
        rate = base
    return rate * (1 + step + epoch * steps) / (warmup * steps) if epoch < warmup else rate


class Meter:
    """Loss and accuracy over pictures, summed on the device."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, pictures

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        count = len(labels)
        self.sums += torch.stack([loss * count, hits[:, 0].sum(), hits.sum(), loss.new_tensor(count)]).double()

    def result(self) -> dict[str, float]:
        """Mean loss, top-1 and top-5 in per cent."""
        loss, top1, top5, count = self.sums.tolist()
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count} if count else {}


class Run:
    """Network, method, optimisers and position of one training run.

    Args:
        loader: of training batches; its `epoch` and `batch` are the run's position.
        rate: (epoch, step, steps an epoch) -> learning rate.
        make_optimizer: parameters -> optimiser.
    """

    def __init__(
        self,
        network: nn.Module,
        method,
        loader,
        epochs: int,
        rate: Callable[[int, int, int], float],
        make_optimizer: Callable[[list], torch.optim.Optimizer],
        label_smoothing: float = 0.0,
        amp: bool = False,
    ):
        self.network, self.method, self.loader, self.epochs, self.rate = network, method, loader, epochs, rate
        self.label_smoothing, self.amp = label_smoothing, amp
        self.optimizers = method.optimizers(network, make_optimizer)
        self.meter = Meter(loader.device)
        self.iteration = 0
        self.best = -math.inf  # top-1 of the best evaluation
        self._last_loss = torch.zeros(())

    @property
    def epoch(self) -> int:
        return self.loader.epoch

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1."""
        return (self.epoch + self.loader.batch / len(self.loader)) / self.epochs

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss of a batch."""
        with torch.autocast(self.loader.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.network(images)
        logits = logits.float()
        return logits, F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.iteration += 1

    def step(self, *batches: tuple[Tensor, Tensor]) -> None:
        self.network.train()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(self.epoch, self.loader.batch - 1, len(self.loader))
        self.check_finite()  # of the step before: asking for this one's loss would make a GPU wait
        self._last_loss, logits = self.method.step(self, *batches)
        self.meter.add(self._last_loss, logits, batches[-1][1])

    def check_finite(self) -> None:
        if not math.isfinite(self._last_loss):
            raise ValueError(
                f"the loss of iteration {self.iteration} is {float(self._last_loss)}: stopped; "
                "the last good checkpoint stands; a smaller --lr may help"
            )

    def state_dict(self) -> dict:
        self.check_finite()
        rng = {"cpu": torch.get_rng_state()}
        if self.loader.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.loader.device)
        return {
            "state_dict": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loader": self.loader.state_dict(),
            "iteration": self.iteration,
            "best": self.best,
            "meter": self.meter.sums.tolist(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. Raises ValueError if it is not of this kind of run."""
        try:
            self.network.load_state_dict(state["state_dict"])
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


def fit(run: Run, callbacks: list) -> None:
    """Train `run` to its end. Callbacks are told `after_step(run)` and `after_epoch(run, results)`."""
    while run.epoch < run.epochs:
        group = []
        for batch in run.loader:
            group.append(batch)
            if len(group) < run.method.batches_per_step:
                continue
            run.step(*group)
            group = []
            for callback in callbacks:
                callback.after_step(run)
        run.check_finite()
        results = {"train": run.meter.result()}  # callbacks add to it, and see what those before them added
        run.meter = Meter(run.loader.device)
        for callback in callbacks:
            callback.after_epoch(run, results)


@torch.no_grad()
def evaluate(network: nn.Module, loader) -> dict[str, float]:
    """Loss, top-1 and top-5 (per cent) over all pictures of `loader`, each once."""
    network.eval()
    meter = Meter(loader.device)
    for images, labels in loader:
        logits = network(images)
        meter.add(F.cross_entropy(logits, labels), logits, labels)
    return meter.result()
