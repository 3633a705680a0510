"""How several estimates of a patch's evidence become one map."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["combined"]


def combined(
    stream: Tensor, *direct: Tensor, heads: int | tuple[int, ...] = 1, apart: bool = False
) -> Tensor:
    """(s + d₁ + d₂ + …)·√s, where each estimate is divided by Σ|map| first.

    Estimates come on scales of their own, so each counts by its share. The factor √s keeps what
    the direct estimates say of a patch only as far as the stream confirms that the patch matters.

    Args:
        stream: evidence that is nowhere negative, its last dimension the patches.
        direct: further estimates of either sign, of the same shape.
        heads: the dimensions of blocks and heads, over which a map is the sum.
        apart: keep these dimensions.

    Returns:
        the map, or its entries of the shape of ``stream``; an estimate without any evidence adds
        nothing.

    Examples:
        >>> stream = torch.tensor([[[1.0, 3.0]]])
        >>> combined(stream, torch.tensor([[[2.0, -2.0]]]))
        tensor([[0.3750, 0.2165]])
    """
    estimates = torch.stack([stream, *direct])
    shifted = heads + 1 if isinstance(heads, int) else tuple(dim + 1 for dim in heads)
    whole = estimates.sum(shifted, keepdim=True)
    # Nothing divided by the smallest number is nothing.
    total = whole.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(whole.dtype).tiny)
    maps = (whole[0] / total[0]).sqrt() * ((estimates if apart else whole) / total).sum(0)
    return maps if apart else maps.squeeze(heads)
