"""Class identifiability: how high a class stands among the logits of a token (Vilas et al. §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.errors import NonFiniteError


def _checked(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise NonFiniteError("logits hold NaN or infinity: a rank needs finite numbers.")
    # Half precision rounds many logits to the same number, which would tie their ranks.
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def rank(logits: Tensor, target: Tensor) -> Tensor:
    """Number of *other* classes whose logit is at least the target's: 0 is the best rank.

    Counted, not sorted, so ties count against the target and a constant readout ranks C − 1.

    Args:
        logits: …×C.
        target: class indices, broadcastable to the leading dimensions of ``logits``.

    Returns:
        int64, of the leading shape of ``logits``.

    Raises:
        NonFiniteError: if a logit is NaN or infinite.

    Examples:
        >>> rank(torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([2]))
        tensor([1])
    """
    logits = _checked(logits)
    index = target.to(logits.device).expand(logits.shape[:-1])[..., None]
    return (logits >= logits.gather(-1, index)).sum(-1) - 1


def all_ranks(logits: Tensor) -> Tensor:
    """The rank of every class at once (…×C, int64), by one sort; ties as in :func:`rank`.

    Raises:
        NonFiniteError: if a logit is NaN or infinite.

    Examples:
        >>> all_ranks(torch.tensor([0.1, 0.7, 0.7]))
        tensor([2, 1, 1])
    """
    logits = _checked(logits).contiguous()
    ascending = logits.sort(-1).values
    below = torch.searchsorted(ascending, logits, right=False)
    return logits.shape[-1] - 1 - below


def identifiability(logits: Tensor, target: Tensor) -> Tensor:
    """R = 1 − rank/C: 1 where the target has the highest logit, 1/C where all logits are equal.

    Args:
        logits: …×C.
        target: class indices, broadcastable to the leading dimensions of ``logits``.

    Returns:
        float64, of the leading shape of ``logits``.

    Examples:
        >>> identifiability(torch.zeros(1, 4), torch.tensor([0]))
        tensor([0.2500], dtype=torch.float64)
    """
    return (logits.shape[-1] - rank(logits, target)).double() / logits.shape[-1]
