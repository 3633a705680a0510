"""How several estimates of a patch's evidence become one map."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["combined"]


def combined(stream: Tensor, *direct: Tensor) -> Tensor:
    """(s + d₁ + d₂ + …)·√s, where each estimate is divided by Σ|map| first.

    Estimates come on scales of their own, so each counts by its share. The factor √s keeps what
    the direct estimates say of a patch only as far as the stream confirms that the patch matters.

    Args:
        stream: evidence that is nowhere negative, B×E×N; its map is the sum over E.
        direct: further estimates of either sign, B×E×N.

    Returns:
        B×E×N; an estimate without any evidence adds nothing.

    Examples:
        >>> stream = torch.tensor([[[1.0, 3.0]]])
        >>> combined(stream, torch.tensor([[[2.0, -2.0]]]))
        tensor([[[0.3750, 0.2165]]])
    """
    shares = [_share(estimate) for estimate in (stream, *direct)]
    return torch.stack(shares).sum(0) * shares[0].sum(1, keepdim=True).sqrt()


def _share(estimate: Tensor) -> Tensor:
    total = estimate.sum(1, keepdim=True).abs().sum(2, keepdim=True)
    return estimate / torch.where(total > 0, total, 1.0)
