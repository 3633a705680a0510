"""How several estimates of a patch's evidence become one map."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["combined", "share"]


def share(estimate: Tensor, heads: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """An estimate divided by Σ|map|, the map being its sum over blocks and heads.

    Args:
        estimate: entries of a patch, …×h×w or …×N, with block and head dimensions.
        heads: the dimensions of blocks and heads.

    Returns:
        the entries' shares, and the map's.
    """
    whole = estimate.sum(heads, keepdim=True)
    total = whole.abs().sum(-1, keepdim=True)
    factor = 1.0 / torch.where(total > 0, total, 1.0)
    return estimate * factor, whole * factor


def combined(stream: Tensor, *direct: Tensor, heads: int | tuple[int, ...] = 1) -> Tensor:
    """(s + d₁ + d₂ + …)·√s, where each estimate is divided by Σ|map| first.

    Estimates come on scales of their own, so each counts by its share. The factor √s keeps what
    the direct estimates say of a patch only as far as the stream confirms that the patch matters.

    Args:
        stream: evidence that is nowhere negative, its last dimension the patches.
        direct: further estimates of either sign, of the same shape.
        heads: the dimensions of blocks and heads, over which a map is the sum.

    Returns:
        entries of the shape of ``stream``; an estimate without any evidence adds nothing.

    Examples:
        >>> stream = torch.tensor([[[1.0, 3.0]]])
        >>> combined(stream, torch.tensor([[[2.0, -2.0]]]))
        tensor([[[0.3750, 0.2165]]])
    """
    entries, whole = share(stream, heads)
    for estimate in direct:
        entries = entries + share(estimate, heads)[0]
    return entries * whole.sqrt()
