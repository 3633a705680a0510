"""Layer norm and RMS norm: values and Jacobians, with σ free or frozen.

With x̂ the normalised input and σ its scale, the Jacobian is
J = diag(γ)(I − 11ᵀ/D − x̂x̂ᵀ/D)/σ; RMS norm has no 11ᵀ/D. With σ frozen the x̂x̂ᵀ term falls away.
timm's "simple" norm divides by the standard deviation without removing the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["NormJacobian", "NormKind", "Normalised", "normalise"]

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


@dataclass(frozen=True)
class NormJacobian:
    """diag(γ/σ)(I − 11ᵀ/D − x̂x̂ᵀ/D) at each row, without the last term where σ is frozen.

    Attributes:
        scale: γ/σ, …×Q×D or …×Q×1.
        centres: whether the norm removes the mean.
        x_hat, slope: the two factors of σ's term, …×Q×D; None where σ is frozen.
    """

    scale: Tensor
    centres: bool
    x_hat: Tensor | None = None
    slope: Tensor | None = None

    @classmethod
    def at(
        cls, state: Normalised, gamma: Tensor | None, kind: NormKind, frozen: bool
    ) -> NormJacobian:
        """The Jacobian at a normalised input, with σ a constant if ``frozen``."""
        scale = state.inverse_sigma if gamma is None else state.inverse_sigma * gamma
        if frozen:
            return cls(scale, kind == "layer")
        return cls(scale, kind == "layer", state.x_hat, state.sigma_slope)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ·cotangent: …×Q×K×D for K cotangents of each row."""
        return self._project(cotangent * self.scale[..., None, :], self.x_hat, self.slope)

    def jvp(self, tangent: Tensor) -> Tensor:
        """J·tangent: …×Q×K×D for K tangents of each row."""
        return self._project(tangent, self.slope, self.x_hat) * self.scale[..., None, :]

    def __getitem__(self, index: Any) -> NormJacobian:
        """Of one block, where the rows are L×…."""
        parts = (None if t is None else t[index] for t in (self.x_hat, self.slope))
        return NormJacobian(self.scale[index], self.centres, *parts)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Jᵀ·c = scale∘c − (c·into)·back/D, for cotangents c of few rows: three operations.

        Returns:
            scale (…×Q×1×D), into (…×Q×D×r) and back (…×Q×r×D).
        """
        assert self.x_hat is not None and self.slope is not None
        scale = self.scale[..., None, :]
        mean = [torch.ones_like(self.x_hat)] if self.centres else []
        basis = torch.stack([*mean, self.x_hat], -2)
        same = self.slope is self.x_hat
        back = basis if same else torch.stack([*mean, self.slope], -2)
        return scale, (basis * scale).mT, back

    def _project(self, v: Tensor, right: Tensor | None, left: Tensor | None) -> Tensor:
        out = v - v.mean(-1, keepdim=True) if self.centres else v
        if right is None or left is None:
            return out
        along = v @ right[..., None]
        return torch.addcmul(out, along, left[..., None, :], value=-1.0 / v.shape[-1])
