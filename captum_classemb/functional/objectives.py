"""The scores that an attribution explains, as derivatives with respect to the class logits.

The gradient of log p_c is e_c − p. Where p_c is close to 1 it is small and lost to rounding if
written so. The log-odds log(p_c / (1 − p_c)) has the gradient e_c − q, with q the softmax over the
other classes; λ = 1 − p_c, summed from the others, times that is the same without cancellation.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from captum_classemb.errors import InputError

__all__ = ["Objective", "check_objective", "logit_gradient", "paper_weights", "runner_up"]

Objective = Literal["paper", "log_probability", "logit", "log_odds"]


def check_objective(objective: str, allowed: tuple[str, ...]) -> None:
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
    # Measured from the highest, s − p·s of the class on top does not cancel.
    s = s - s.amax(-1, keepdim=True)
    return p, p * (s - (p * s).sum(-1, keepdim=True))


def logit_gradient(
    logits: Tensor,
    target: Tensor,
    objective: Objective,
    contrast: Tensor | None = None,
    paper: tuple[Tensor, Tensor] | None = None,
    of_logit: Tensor | None = None,
) -> Tensor:
    """∂score/∂z for K target classes of each image.

    Args:
        logits: z, …×B×C.
        target: class indices, B×K.
        objective: ``"logit"`` is z_c; ``"log_probability"`` is log p_c; ``"log_odds"`` is
            log p_c − log(1 − p_c), a multiple of the same direction; ``"paper"`` is the
            log-probability after a second softmax, as the code of Vilas et al. (2023) computes it.
            With one class there is nothing to normalise over: all are the logit.
        contrast: other classes, B×K: the score is then z_c − z_other.
        paper: :func:`paper_weights` of the logits, where they are at hand.
        of_logit: the gradient of ``"logit"``, likewise.

    Returns:
        …×B×K×C.

    Examples:
        >>> import torch
        >>> logit_gradient(torch.zeros(1, 2), torch.tensor([[0]]), "log_probability")
        tensor([[[ 0.5000, -0.5000]]])
    """
    check_objective(objective, get_args(Objective))
    classes = logits.shape[-1]
    target = target.expand(*logits.shape[:-1], target.shape[-1])
    index = target[..., None]
    if of_logit is None:
        one_hot = logits.new_zeros(*target.shape, classes).scatter(-1, index, 1.0)
    elif contrast is not None:
        return of_logit
    else:
        one_hot = of_logit
    if contrast is not None:
        return one_hot.scatter(-1, contrast.expand(target.shape)[..., None], -1.0)
    if objective == "logit" or classes == 1:
        return one_hot
    if objective == "paper":
        p, r = (part[..., None, :] for part in paper or paper_weights(logits))
        p = p.expand(one_hot.shape)
        own, others = p.gather(-1, index), p.scatter(-1, index, 0.0)
        return own * (one_hot * others.sum(-1, keepdim=True) - others) - r
    others = logits[..., None, :].expand(one_hot.shape).scatter(-1, index, float("-inf"))
    log_odds = one_hot - others.softmax(-1)
    if objective == "log_odds":
        return log_odds
    return log_odds * (others.logsumexp(-1) - logits.logsumexp(-1)[..., None]).exp()[..., None]


def runner_up(logits: Tensor, target: Tensor) -> Tensor:
    """The highest logit beside the target's, for each of K targets: B×K."""
    others = logits[:, None].expand(*target.shape, -1).scatter(-1, target[..., None], float("-inf"))
    return others.argmax(-1)
