"""Ridge regression to ±1 classes from sums alone: Gram matrix, class sums and counts.

With rows x_i of class y_i, targets ±1, an intercept and the penalty α‖W‖² (Vilas et al. §7; the
same objective as scikit-learn's ``Ridge``), the solution is

    W = 2 (Σ_c − n_c μ)ᵀ (G − n μμᵀ + αI)⁻¹,   b = 2 n_c/n − 1 − Wμ,

where G is the sum of xxᵀ, Σ_c and n_c the sum and number of the rows of class c, μ the mean of all
n rows. So one pass over the rows is enough, and sums of parts of the data add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of the Gram matrix that are computed together; what lies above them is left out.
_PANEL = 128


def packed_size(width: int) -> int:
    """How many numbers :func:`packed_gram` returns for D = ``width``.

    Examples:
        >>> packed_size(256), packed_size(100)
        (49152, 10000)
    """
    return sum((stop - start) * stop for start, stop in _panels(width))


def _panels(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + _PANEL, width)) for start in range(0, width, _PANEL)]


def packed_gram(rows: Tensor) -> Tensor:
    """Σ xxᵀ without most of its upper triangle, which the lower one repeats.

    Args:
        rows: R×D.

    Returns:
        float64, :func:`packed_size` numbers: panels of rows, each up to the diagonal.
    """
    x = rows.double()
    panels = [(x[:, a:b].T @ x[:, :b]).flatten() for a, b in _panels(x.shape[1])]
    return torch.cat(panels)


def unpack_gram(packed: Tensor, width: int) -> Tensor:
    """The whole symmetric matrix (D×D) of what :func:`packed_gram` returned."""
    gram = packed.new_zeros(width, width)
    taken = 0
    for start, stop in _panels(width):
        size = (stop - start) * stop
        gram[start:stop, :stop] = packed[taken : taken + size].view(stop - start, stop)
        taken += size
    lower = gram.tril()
    return lower + lower.tril(-1).T


def ridge(
    gram: Tensor, class_sums: Tensor, class_counts: Tensor, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weights and biases of the ridge regression to ±1 one-hot classes.

    Args:
        gram: Σ xxᵀ over all rows, float64, D×D.
        class_sums: Σ x over the rows of each class, float64, C×D.
        class_counts: number of rows of each class, C.
        alpha: the penalty of the squared weights; biases are free.

    Returns:
        weight C×D and bias C, float64. A class without rows has weight 0 and bias −1.

    Examples:
        >>> x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        >>> weight, bias = ridge(x.T @ x, x, torch.tensor([1, 1]), alpha=2.0)
        >>> weight.flatten().tolist(), bias.tolist()
        ([0.5, -0.5], [0.0, 0.0])
    """
    counts = class_counts.to(gram.dtype)
    # Without any rows everything is 0 and the bias −1, as for a class without rows.
    total = counts.sum().clamp(min=1.0)
    mean = class_sums.sum(0) / total
    centred = gram - total * torch.outer(mean, mean)
    centred.diagonal().add_(alpha)
    targets = 2.0 * (class_sums - counts[:, None] * mean)
    factor, failed = torch.linalg.cholesky_ex(centred)
    if failed:
        # Without a penalty features that depend on each other leave it singular.
        weight = targets @ torch.linalg.pinv(centred, hermitian=True)
    else:
        weight = torch.cholesky_solve(targets.T, factor).T
    return weight, 2.0 * counts / total - 1.0 - weight @ mean
