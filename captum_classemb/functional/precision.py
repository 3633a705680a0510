"""In what precision the library computes, whatever the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from captum_classemb.errors import NonFiniteError

__all__ = ["no_autocast", "refuse_non_finite", "upcast"]


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Compute without gradients and without autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def refuse_non_finite(inputs: Tensor) -> None:
    """Raise NonFiniteError if a pixel is NaN or infinite."""
    # The sum is finite if every pixel is: one pass, where isfinite takes four.
    if not torch.isfinite(upcast(inputs).sum()):
        raise NonFiniteError("inputs hold NaN or infinity: finite pixels are needed.")
