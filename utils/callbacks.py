"""What happens when during a run: evaluation, records, checkpoints, progress. `fit` calls them in order."""

import json
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from utils.average import statistics
from utils.files import save_checkpoint, save_text, writing
from utils.run import Batches, Run, evaluate


class Callback:
    def after_step(self, run: Run) -> None:
        pass

    def after_epoch(self, run: Run, results: dict[str, dict]) -> None:
        """`results` maps "train" (and what earlier callbacks added) to figures; `run.epoch` epochs are done."""


class Evaluate(Callback):
    """Adds results["val"]."""

    def __init__(self, loader: Batches):
        self.loader = loader

    def after_epoch(self, run: Run, results: dict[str, dict]) -> None:
        results["val"] = evaluate(run.kept_network(), self.loader, run.ranks)


class Record(Callback):
    """Appends to `metrics.jsonl` and TensorBoard events in `job_dir`; drops what an interrupted run wrote too much.

    `before`: figures of epoch 0, by stage.
    """

    def __init__(self, job_dir: Path, epochs_done: int, before: dict[str, dict]):
        from torch.utils.tensorboard import SummaryWriter

        self.path = job_dir / "metrics.jsonl"
        old = self.path.read_text().splitlines() if epochs_done and self.path.exists() else []
        save_text(self.path, "".join(f"{line}\n" for line in old if _epoch(line) <= epochs_done))
        self.writer = SummaryWriter(str(job_dir / "tensorboard"), purge_step=epochs_done + 1)
        if not epochs_done:
            for stage, figures in before.items():
                self.write(0, stage, figures)

    def after_epoch(self, run: Run, results: dict[str, dict]) -> None:
        results["train"] |= {"lr": run.optimizers[0].param_groups[0]["lr"], **run.method.figures(run.network)}
        for split, figures in results.items():
            self.write(run.epoch, split, figures)

    def write(self, epoch: int, split: str, figures: dict[str, float]) -> None:
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"epoch": epoch, "split": split, **figures}) + "\n")
        with writing(Path(self.writer.log_dir)):
            for name, value in figures.items():
                self.writer.add_scalar(f"{name}/{split}", value, epoch)
            self.writer.flush()


def _epoch(line: str) -> float:
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError):  # the last line of a killed run
        return float("inf")


class Save(Callback):
    """Writes `last.pt` after every epoch, `best.pt` when top-1 rises, and `last.pt` when told to stop, then exits.

    Both hold the weights to keep and all that a resumed run needs.
    While it is entered, SIGTERM and SIGINT end the run after the step at hand, with status 143 and 130.
    """

    def __init__(self, folder: Path, facts: dict):
        self.folder, self.facts, self.stop = folder, facts, 0

    def __enter__(self) -> "Save":
        self.old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        self.stop = number

    def after_step(self, run: Run) -> None:
        # Several processes must stop after the same step, so they ask each other, now and then.
        if run.ranks.world == 1 or run.iteration % 10 == 0:
            self._stop_if_told(run)

    def after_epoch(self, run: Run, results: dict[str, dict]) -> None:
        is_best = results["val"]["top1"] > run.best
        run.best = max(run.best, results["val"]["top1"])
        if is_best:
            self.write(run, "best.pt")
        self.write(run, "last.pt")
        self._stop_if_told(run, saved=True)

    def write(self, run: Run, name: str) -> None:
        own = set(map(id, statistics(run.network)))  # every process gathers those from its own pictures
        tensors = [*run.network.parameters(), *run.network.buffers()]
        run.ranks.check_same([tensor for tensor in tensors if id(tensor) not in own], "weights and masks")
        if run.ranks.first:
            save_checkpoint(self.folder / name, self.facts | {"epoch": run.epoch} | run.state_dict())

    def _stop_if_told(self, run: Run, saved: bool = False) -> None:
        self.stop = run.ranks.highest(self.stop)
        if self.stop:
            if not saved:
                self.write(run, "last.pt")
            if run.ranks.first:
                print(f"stopped; {self.folder / 'last.pt'} is written, and --resume goes on from it", file=sys.stderr)
            raise SystemExit(128 + self.stop)


class Show(Callback):
    """Progress: a bar with rate and time left on a terminal, a line an epoch elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        rate = TextColumn("{task.fields[rate]}")
        self.bar = Progress(*columns, rate, console=console, disable=not console.is_terminal)
        self.task = self.since = None

    def __enter__(self) -> "Show":
        self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def after_step(self, run: Run) -> None:
        steps = len(run.loader) // run.batches_per_step
        if self.task is None:
            self.task = self.bar.add_task("", total=steps * run.epochs, completed=run.iteration, rate="")
        if self.since is None:  # the first step of an epoch: evaluation is over
            self.since, self.first = time.perf_counter(), run.iteration
        elif self.console.is_terminal:
            images = (run.iteration - self.first) * run.loader.batch_size * run.batches_per_step
            rate = f"{images / (time.perf_counter() - self.since):.0f} images/s"
            where = f"epoch {min(run.epoch + 1, run.epochs)}/{run.epochs}"
            self.bar.update(self.task, completed=run.iteration, description=where, rate=rate)

    def after_epoch(self, run: Run, results: dict[str, dict]) -> None:
        self.since = None
        train, val = results["train"], results["val"]
        self.console.print(
            f"epoch {run.epoch}/{run.epochs}  lr {train['lr']:.2e}  train loss {train['loss']:.3f} "
            f"top-1 {train['top1']:.2f}  val loss {val['loss']:.3f} top-1 {val['top1']:.2f} top-5 {val['top5']:.2f}  "
            f"{train['images_per_second']:.0f} images/s"
        )
