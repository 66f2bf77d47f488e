"""A training run: its state, and the loop that never learns what the method does."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.average import Average
from utils.ranks import Ranks

# Policy -> share of the peak rate in an epoch. As 1xN has it, only the warm-up is finer than epochs; ResRep's cosine
# falls with every step: its epoch has a fraction.
POLICIES = {
    "cos": lambda o, e: 0.5 + 0.5 * math.cos(math.pi * (e - o.warmup_epochs) / (o.num_epochs - o.warmup_epochs)),
    "cos_step": lambda o, e: POLICIES["cos"](o, e),
    "step": lambda o, e: o.lr_gamma ** decays(o, e),
    "exp": lambda o, e: 0.96**e,
    "fixed": lambda o, e: 1.0,
}


def decays(options, epoch: int) -> int:
    """How often the step policy has decayed: at the given epochs, or as published every 30 and once more at 80."""
    if options.lr_decay_step:
        return sum(epoch >= milestone for milestone in options.lr_decay_step)
    return epoch // options.lr_decay_freq + (epoch >= 80)


def learning_rate(options, epoch: int, step: int, steps: int) -> float:
    """The rate of step `step` (of `steps`) of `epoch`, under the `Options` of a run."""
    exact = epoch + step / steps if options.lr_policy == "cos_step" else epoch
    rate = options.lr * POLICIES[options.lr_policy](options, exact)
    warmup = options.warmup_epochs
    return rate * (1 + step + epoch * steps) / (warmup * steps) if epoch < warmup else rate


class Meter:
    """Loss and accuracy over pictures, summed on the device."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, pictures

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        count = len(labels)
        self.sums += torch.stack([loss * count, hits[:, 0].sum(), hits.sum(), loss.new_tensor(count)]).double()

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
        ema: decay of an average of the weights, which is evaluated and kept instead of the last ones.
        compile: by torch.compile.
    """

    def __init__(
        self,
        network: nn.Module,
        method,
        loader,
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
        self.batches_per_step = method.batches_per_step * accumulate
        self.optimizers = method.optimizers(network, make_optimizer)
        self.average = Average(network, ema) if ema else None
        self.model = torch.compile(network) if compile else network  # computes what `network` does, faster
        if self.ranks.world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.meter = Meter(loader.device)
        self.iteration = 0  # steps done, or the number of the one at hand
        self.best = -math.inf  # top-1 of the best evaluation
        self._last_loss = torch.zeros(())

    @property
    def epoch(self) -> int:
        return self.loader.epoch

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1."""
        return (self.epoch + self.loader.batch / len(self.loader)) / self.epochs

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch; its figures go into the meter."""
        with torch.autocast(self.loader.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.model(images)
        logits = logits.float()
        loss = self.loss(logits, labels, images)
        self._last_loss = loss.detach()
        self.meter.add(self._last_loss, logits.detach(), labels)
        return loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, *optimizers: torch.optim.Optimizer) -> None:
        """A step of `optimizers`, by default all; gradients are gone then, those of the others too."""
        for optimizer in optimizers or self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

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
            self.average.update()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """In this block the network has the weights to evaluate and to keep, and they obey the method."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            self.method.settle(self.network)
            yield
        if self.average:
            self.method.settle(self.network)  # masks may follow the weights

    def keep_average(self) -> None:
        """Training is over: the network takes the weights to keep for good."""
        if self.average:
            self.average.swap()
        self.method.settle(self.network)

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
            "average": self.average.tensors if self.average else None,
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
            if self.average:
                self.average.load(state["average"])
            torch.set_rng_state(state["rng"]["cpu"])
            if "cuda" in state["rng"] and self.loader.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.loader.device)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"--resume: not a checkpoint of this run ({' '.join(str(error).split())[:200]})") from None


def fit(run: Run, callbacks: list) -> None:
    """Train `run` to its end. Callbacks are told `after_step(run)` and `after_epoch(run, results)`."""
    while run.epoch < run.epochs:
        batches = []
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
        run.meter = Meter(run.loader.device)
        for callback in callbacks:
            callback.after_epoch(run, results)


@torch.no_grad()
def evaluate(network: nn.Module, loader, ranks: Ranks | None = None) -> dict[str, float]:
    """Loss, top-1 and top-5 (per cent) over all pictures of `loader`, each once, whichever process has it."""
    network.eval()
    meter = Meter(loader.device)
    for images, labels in loader:
        logits = network(images)
        meter.add(F.cross_entropy(logits, labels), logits, labels)
    return meter.result(ranks or Ranks())
