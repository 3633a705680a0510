"""Signs for the permutation test of a mean difference whose unit is the image.

Below :data:`EXACT_BELOW` images p is the share of all 2^B sign assignments whose sum is at least as
far from 0 as the observed one; else p = (1 + hits)/(1 + draws) over random ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: With fewer images than this every assignment of signs is tried.
EXACT_BELOW = 13

#: Sums this close (relatively) are equal: they differ by the order of addition alone.
_TIE = 1e-9


def all_signs(count: int) -> Tensor:
    """Every assignment of signs to ``count`` images: int8, count×2^count."""
    number = torch.arange(2**count)
    bits = (number[None] >> torch.arange(count)[:, None]) & 1
    return (1 - 2 * bits).to(torch.int8)


def random_signs(indices: Sequence[int], draws: int, seed: int = 0) -> Tensor:
    """Signs that depend on the image's index and the seed alone: int8, B×draws.

    So they are the same in whatever order, batches or processes the images come.
    """
    rows = []
    for index in indices:
        words = np.random.Philox(key=[seed, index]).random_raw(-(-draws // 64))
        bits = np.unpackbits(np.asarray(words, dtype="<u8").view(np.uint8))[:draws]
        rows.append(torch.from_numpy(1 - 2 * bits.astype(np.int8)))
    return torch.stack(rows) if rows else torch.empty(0, draws, dtype=torch.int8)


def count_hits(drawn: Tensor, observed: Tensor, scale: Tensor) -> Tensor:
    """How many drawn sums are at least as far from 0 as the observed one.

    Args:
        drawn: R×draws.
        observed: R.
        scale: sum of the absolute differences, R: what rounding errors are measured by.

    Returns:
        int64, R.
    """
    return (drawn.abs() >= (observed.abs() - _TIE * scale)[:, None]).sum(-1)
