"""In what precision the library computes, whatever the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["no_autocast", "upcast"]


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Compute without gradients and without autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
