"""Several processes: one a GPU, or a few on the CPU, started by torchrun. One process is a world of one."""

import contextlib
import os
import sys
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

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, number: int) -> int:
        """The highest of all processes' numbers."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
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
        digest = digest.to(tensors[0].device) if tensors else digest
        lowest, highest = digest.clone(), digest.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        assert torch.equal(lowest, highest), f"{what} differ between processes"


def started() -> bool:
    """Is this one of the processes that torchrun started?"""
    return "RANK" in os.environ


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did, for the time of the block."""
    if not started():
        yield Ranks()
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        dist.barrier()  # the first still writes; gloo aborts a process that leaves before it
    finally:
        dist.destroy_process_group()


def start(script: str, argv: list[str], gpus: list[int]) -> None:
    """Become torchrun with one process for each of `gpus`; does not return.

    A process that dies takes the others down, and all start again from the last checkpoint, thrice at most.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts", "3"]
    os.execve(sys.executable, [*torchrun, "--nproc_per_node", str(len(gpus)), script, *argv, "--resume"], environment)
