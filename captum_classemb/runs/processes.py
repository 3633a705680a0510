"""The processes of a run, in the words of ``torch.distributed``: those of torchrun, or this one."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from captum_classemb.errors import ClassEmbError

T = TypeVar("T")

#: The slowest process may come this much later than the fastest.
_TIMEOUT = timedelta(days=2)


def init_process_group() -> None:
    """Join the other processes if torchrun started this one.

    Only sums are exchanged, once a pass: gloo carries them between CPUs and GPUs alike. The
    processes stay together until they end, for a group that is taken apart cannot be joined again
    reliably.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_TIMEOUT)
        atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes the results."""
    return get_rank() == 0


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, where "cuda" is named without a number."""
    if device.type == "cuda" and device.index is None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    return device


def on_main_process(function: Callable[[], T]) -> T:
    """What the function returns on the main process, on all; or the error that it raises there."""
    box: list[T | ClassEmbError | None] = [None]
    if is_main_process():
        try:
            box = [function()]
        except ClassEmbError as error:
            box = [error]
    if get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], ClassEmbError):
        raise box[0]
    return box[0]  # type: ignore[return-value]


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum over all processes, the same bits on each; the tensor itself if there is one."""
    if get_world_size() == 1:
        return tensor
    total = tensor.cpu().clone()
    dist.all_reduce(total, op)
    return total.to(tensor.device)


def all_gather(values: list[T]) -> list[T]:
    """The values of all processes, on every one, in the order of their ranks."""
    if get_world_size() == 1:
        return values
    every: list[list[T]] = [[]] * get_world_size()
    dist.all_gather_object(every, values)
    return [value for one in every for value in one]


def barrier() -> None:
    """Wait until every process is here."""
    if get_world_size() > 1:
        dist.barrier()
