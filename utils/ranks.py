"""Several processes: one a GPU, or a few on the CPU, started by torchrun. One process is a world of one."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1
    local: int = 0  # number on this machine

    @property
    def first(self) -> bool:
        """The one that writes files and talks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process holds what is exchanged."""
        return torch.device("cuda", self.local) if dist.get_backend() == "nccl" else torch.device("cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensors: list[Tensor]) -> None:
        """All processes take over the values of the first, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def highest(self, number: int) -> int:
        """The highest of all processes' numbers."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def check_same(self, tensors: list[Tensor], what: str) -> None:
        """Assert that all processes hold the same values: sums and position-weighted sums agree exactly."""
        if self.world == 1:
            return
        digest = torch.zeros(2 * len(tensors), dtype=torch.float64)
        for number, tensor in enumerate(tensors):
            flat = tensor.detach().flatten().double().cpu()
            places = torch.arange(1, len(flat) + 1, dtype=torch.float64)
            digest[2 * number], digest[2 * number + 1] = flat.sum(), flat @ places
        digest = digest.to(self.device)
        lowest, highest = digest.clone(), digest.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        assert torch.equal(lowest, highest), f"{what} differ between processes"


def started() -> bool:
    """Is this one of the processes that torchrun started?"""
    return "RANK" in os.environ


def restarted() -> bool:
    """Has torchrun started the processes anew, since one of them died?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did, for the time of the block.

    Raises:
        ValueError: there are more of them than GPUs.
    """
    if not started():
        yield Ranks()
        return
    here = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        if here.local >= torch.cuda.device_count():
            raise ValueError(f"process {here.local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(here.local)  # else all of them exchange through the first GPU
    dist.init_process_group("nccl" if on_gpus else "gloo", **_meeting_point())
    try:
        yield here
        dist.barrier()  # the first still writes; gloo aborts a process that leaves before it
    finally:
        dist.destroy_process_group()


def _meeting_point() -> dict:
    """Where processes that were started anew meet, as arguments of `init_process_group`.

    torchrun keeps one store for all attempts on a machine, where a process may still find the addresses of those that
    died: each attempt gets its own part of it.
    """
    if not restarted() or os.environ.get("GROUP_WORLD_SIZE") != "1":  # other machines count attempts by themselves
        return {}
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    return {
        "store": dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store),
        "rank": rank,
        "world_size": world,
    }


def start(script: str, argv: list[str], gpus: list[int]) -> None:
    """Be torchrun, with one process for each of `gpus`, until they end; does not return.

    A process that dies takes the others down, and all start again from the last checkpoint, thrice at most. What is
    wrong they say themselves, in one line: torchrun's own page about it is left out.

    Args:
        gpus: numbers among the GPUs that this process sees: CUDA_VISIBLE_DEVICES may show it some of the machine's.

    Raises:
        ValueError: there is no GPU of such a number.
        SystemExit: with the status of the first process that failed, or 0.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = visible if visible[0] else [str(number) for number in range(torch.cuda.device_count())]
    if max(gpus) >= len(visible):
        raise ValueError(f"--gpus {max(gpus)}: there are {len(visible)}, numbered from 0")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number] for number in gpus)
    try:
        run.main(["--standalone", "--max_restarts", "3", "--nproc_per_node", str(len(gpus)), script, *argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    raise SystemExit(0)
