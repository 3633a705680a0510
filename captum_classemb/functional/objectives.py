"""The scores that a gradient can explain, as derivatives with respect to the class logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from captum_classemb.errors import InputError

__all__ = ["Objective", "check_objective", "logit_gradient", "paper_weights"]

Objective = Literal["paper", "cross_entropy", "logit"]


def check_objective(objective: str, allowed: tuple[str, ...] = get_args(Objective)) -> None:
    """Raise InputError unless ``objective`` is one of ``allowed``."""
    if objective not in allowed:
        raise InputError(f"objective {objective!r} is none of {', '.join(map(repr, allowed))}.")


def paper_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The two weightings that the doubled softmax puts on classes.

    The published code applies a softmax before a cross-entropy that applies its own. With
    p = softmax(z), s = softmax(p) and r = p∘s − p(p·s), its gradient for class c is
    p_c(e_c − p) − r.

    Returns:
        p and r, both …×C.
    """
    p = logits.softmax(-1)
    s = p.softmax(-1)
    return p, p * (s - (p * s).sum(-1, keepdim=True))


def logit_gradient(logits: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """∂score/∂z for one target class a row.

    Args:
        logits: z, B×C.
        target: class indices, B.
        objective: ``"logit"`` is z_c, ``"cross_entropy"`` is log p_c, ``"paper"`` is the
            log-probability after a second softmax, as the code of Vilas et al. (2023) computes it.

    Returns:
        B×C.

    Examples:
        >>> logit_gradient(torch.zeros(1, 2), torch.tensor([0]), "cross_entropy")
        tensor([[ 0.5000, -0.5000]])
    """
    check_objective(objective)
    one_hot = torch.zeros_like(logits).scatter_(-1, target[..., None], 1.0)
    if objective == "logit":
        return one_hot
    if objective == "cross_entropy":
        # 1 − p_c as the sum of the others: where p_c rounds to 1 they are still told apart.
        others = logits.softmax(-1).scatter(-1, target[..., None], 0.0)
        return one_hot * others.sum(-1, keepdim=True) - others
    p, r = paper_weights(logits)
    return p.gather(-1, target[..., None]) * (one_hot - p) - r
