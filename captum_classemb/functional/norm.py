"""Layer norm and RMS norm: values, derivatives, and the affine map that is left when σ is held.

With x̂ the normalised input and σ its scale, the Jacobian is
J = diag(γ)(I − 11ᵀ/D − x̂x̂ᵀ/D)/σ; RMS norm has no 11ᵀ/D. With σ held the x̂x̂ᵀ term falls away.
timm's "simple" norm divides by the standard deviation without removing the mean.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["NormKind", "Normalised", "normalise", "pull", "pull_rows", "push"]

NormKind = Literal["layer", "rms", "simple"]


class Normalised(NamedTuple):
    """A normalised input.

    ``x_hat`` (…×D) is the output before γ; ``sigma_slope`` (…×D) is D·∂σ/∂x, which is ``x_hat``
    itself but for the simple norm; ``inverse_sigma`` is …×1.
    """

    x_hat: Tensor
    sigma_slope: Tensor
    inverse_sigma: Tensor


def normalise(x: Tensor, eps: float, kind: NormKind) -> Normalised:
    """Normalise the last dimension of ``x`` (…×D).

    Examples:
        >>> normalise(torch.tensor([[1.0, 3.0]]), eps=0.0, kind="layer").x_hat
        tensor([[-1.,  1.]])
    """
    width = x.shape[-1]
    if kind == "layer":
        x_hat, _, inverse_sigma = torch.native_layer_norm(x, [width], None, None, eps)
        return Normalised(x_hat, x_hat, inverse_sigma)
    centred = x if kind == "rms" else x - x.mean(-1, keepdim=True)
    # torch.var, which the simple norm uses, divides by D − 1.
    bessel = width / (width - 1) if kind == "simple" else 1.0
    inverse_sigma = torch.rsqrt(centred.square().mean(-1, keepdim=True) * bessel + eps)
    slope = centred * inverse_sigma * bessel
    return Normalised(x * inverse_sigma if kind == "simple" else slope, slope, inverse_sigma)


def pull(
    cotangent: Tensor, state: Normalised, gamma: Tensor | None, kind: NormKind, hold: bool
) -> Tensor:
    """Carry a cotangent (…×D) of the norm's output back to its input: Jᵀ·cotangent.

    Args:
        cotangent: derivative of a scalar with respect to the norm's output, …×D.
        state: the normalised input.
        gamma: the norm's weight, D, or None.
        kind: which norm.
        hold: treat σ as a constant.
    """
    c = cotangent if gamma is None else cotangent * gamma
    sigma_term = 0.0 if hold else state.sigma_slope * (state.x_hat * c).mean(-1, keepdim=True)
    if kind == "layer":
        c = c - c.mean(-1, keepdim=True)
    return (c - sigma_term) * state.inverse_sigma


def pull_rows(cotangent: Tensor, state: Normalised, gamma: Tensor | None, kind: NormKind) -> Tensor:
    """:func:`pull` summed over rows: …×Q×D to …×1×D, without a tensor of all rows' cotangents."""
    c = cotangent if gamma is None else cotangent * gamma
    inverse = state.inverse_sigma.transpose(-2, -1)
    share = inverse * (state.x_hat * c).mean(-1)[..., None, :]
    total = inverse @ c
    if kind == "layer":
        total = total - total.mean(-1, keepdim=True)
    return total - share @ state.sigma_slope


def push(
    tangent: Tensor, state: Normalised, gamma: Tensor | None, kind: NormKind, hold: bool
) -> Tensor:
    """Carry a tangent (…×D) of the norm's input forward to its output: J·tangent."""
    t = tangent
    sigma_term = 0.0 if hold else state.x_hat * (state.sigma_slope * t).mean(-1, keepdim=True)
    if kind == "layer":
        t = t - t.mean(-1, keepdim=True)
    t = (t - sigma_term) * state.inverse_sigma
    return t if gamma is None else t * gamma
