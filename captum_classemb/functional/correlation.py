"""Rank correlation of maps."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.errors import InputError, NonFiniteError


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension; equal values share the mean of theirs."""
    ascending = values.sort(-1).values
    below = torch.searchsorted(ascending, values, right=False)
    up_to = torch.searchsorted(ascending, values, right=True)
    return (below + up_to - 1).double() / 2


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's ρ of two maps, ties averaged.

    Args:
        first: …×h×w.
        second: …×h×w.

    Returns:
        float64, of the leading shape; 0 where a map is constant, since it orders nothing.

    Raises:
        InputError: if the shapes differ.
        NonFiniteError: if a map holds NaN or infinity.

    Examples:
        >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 11.0, 99.0]]))
        tensor(1., dtype=torch.float64)
    """
    if first.shape != second.shape or first.dim() < 2:
        raise InputError(
            f"maps of shape {tuple(first.shape)} and {tuple(second.shape)}: two maps …×h×w of "
            "one shape are needed."
        )
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise NonFiniteError("a map holds NaN or infinity: ranks need finite numbers.")
    a, b = (_average_ranks(m.flatten(-2).contiguous()) for m in (first, second))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return (a * b).sum(-1) / torch.where(scale > 0, scale, 1.0)
