"""The processes that torchrun started, or the only one."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World", "join_world"]

T = TypeVar("T")

#: The slowest process may come this much later than the fastest.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class World:
    """Which of how many processes this is.

    Attributes:
        rank: from 0; rank 0 writes the results.
        size: number of processes on all machines.
        local_rank: number of the process on its machine, which chooses its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """``"auto"``: this process's GPU where there is one, else the CPU; or as named."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return device

    def share(self, value: T) -> T:
        """Rank 0's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, values: list[T]) -> list[T]:
        """The values of all processes, on every one, in the order of their ranks."""
        if self.size == 1:
            return values
        every: list[list[T]] = [[]] * self.size
        dist.all_gather_object(every, values)
        return [value for one in every for value in one]

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each; the tensor itself if it is alone."""
        if self.size == 1:
            return tensor
        total = tensor.cpu().clone()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def join_world() -> World:
    """Join the other processes if torchrun started this one.

    Only sums are exchanged, once a pass: gloo carries them between CPUs and GPUs alike. The
    processes stay together until they end, for a group that is taken apart cannot be joined again
    reliably.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)
        atexit.register(_leave)
    return World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
