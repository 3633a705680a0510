"""Norms as steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.norm import Normalised, NormJacobian, NormKind, normalise
from captum_classemb.functional.precision import upcast
from captum_classemb.readout.derivatives import Derivative, lifted
from captum_classemb.readout.steps import Step, shape_of, together

__all__ = [
    "Grouped",
    "Norm",
]


class Norm(Step):
    """Layer norm, RMS norm or timm's simple norm.

    Args:
        module: a norm module whose kind is known by its class.
        groups: how many equal parts of the last dimension are normalised one by one (the norm of
            each head in differential attention).

    Raises:
        UnsupportedModelError: if the class of the module is not known.
    """

    uniform = False

    def __init__(self, module: nn.Module, groups: int = 1) -> None:
        self.module = module
        self.groups = groups
        self.kind = _kind(module)
        self._read: tuple[Tensor | None, Tensor | None] | None = None

    @property
    def eps(self) -> float | None:
        """Of the module; None stands for that of the dtype it computes in."""
        eps: Any = self.module.eps
        return None if eps is None else float(eps)

    def _parameters(self) -> tuple[Tensor | None, Tensor | None]:
        if self._read is not None:
            return self._read
        found = (getattr(self.module, name, None) for name in ("weight", "bias"))
        gamma, beta = (None if p is None else upcast(p.detach()) for p in found)
        return gamma, beta

    def read(self) -> Norm:
        step = copy.copy(self)
        step._read = self._parameters()
        return step

    def likeness(self) -> tuple[Any, ...] | None:
        return Norm, self.kind, self.groups, self.eps, *map(shape_of, self._parameters())

    def stack(self, steps: Sequence[Any]) -> Norm:
        gammas, betas = zip(*(step._parameters() for step in steps), strict=True)
        step = copy.copy(self)
        step._read = together(gammas), together(betas)
        return step

    def _split(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.unflatten(-1, (self.groups, -1))

    def _join(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.flatten(-2)

    def state(self, x: Tensor) -> Normalised:
        """The normalised input, in float32 or wider."""
        x = self._split(upcast(x))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return normalise(x, eps, self.kind)

    def __call__(self, x: Tensor) -> Tensor:
        gamma, beta = self._parameters()
        x = upcast(x)
        stack = any(p is not None and p.dim() > 1 for p in (gamma, beta))
        if self.kind == "layer" and self.eps is not None and not stack:
            x = self._split(x)
            gamma, beta = (None if p is None else p.to(x.dtype) for p in (gamma, beta))
            return self._join(F.layer_norm(x, x.shape[-1:], gamma, beta, self.eps))
        return self._affine(self.state(x).x_hat)

    def at(self, x: Tensor, frozen: bool = False) -> Derivative:
        return self._at(self.state(x), frozen)

    def _at(self, state: Normalised, frozen: bool) -> Derivative:
        gamma = self._parameters()[0]
        gamma = None if gamma is None else lifted(gamma, state.x_hat.dim())
        jacobian = NormJacobian.at(state, gamma, self.kind, frozen)
        return jacobian if self.groups == 1 else Grouped(jacobian, self.groups)

    def linearised(self, x: Tensor) -> tuple[Tensor, Derivative]:
        state = self.state(x)
        return self._affine(state.x_hat), self._at(state, False)

    def _affine(self, y: Tensor) -> Tensor:
        gamma, beta = self._parameters()
        y = y if gamma is None else y * lifted(gamma, y.dim())
        return self._join(y if beta is None else y + lifted(beta, y.dim()))

    def offset(self) -> Tensor | None:
        beta = self._parameters()[1]
        return None if beta is None else beta.repeat(*(1,) * (beta.dim() - 1), self.groups)

    # -- J·tangent in two halves, for tangents of all source tokens at once: what depends on the
    # rows, and the constant map diag(γ)(I − 11ᵀ/D), which can be folded into a weight that reads.

    def jvp_mean(self, x: Tensor, tangent: Tensor) -> Tensor:
        """The mean over rows of J_q·tangent before the constant map; one tangent for all rows.

        Args:
            x: the rows, …×Q×D.
            tangent: …×N×D.

        Returns:
            …×N×D, without ever forming Q×N×D.
        """
        x_hat, slope, inverse = self.state(x)
        rows, width = x.shape[-2:]
        along = tangent @ (slope * inverse).mT
        moved = (along @ x_hat).mul_(-1.0 / (rows * width))
        return moved.addcmul_(tangent, inverse.mean(-2, keepdim=True))

    def vjp_sum(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """Σ_q J_qᵀ·cotangent for a cotangent that all rows share: …×Q×D and …×1×K×D to …×1×K×D.

        Without a tensor of all rows' cotangents.
        """
        x_hat, slope, inverse = self.state(x)
        gamma = self._parameters()[0]
        c = cotangent[..., 0, :, :]
        c = c if gamma is None else c * gamma.to(c.dtype)
        total = c * inverse.sum(-2, keepdim=True)
        if self.kind == "layer":
            total = total - total.mean(-1, keepdim=True)
        along = (c @ (x_hat * inverse).mT) / x.shape[-1]
        return (total - along @ slope)[..., None, :, :]

    def constant(self, tangent: Tensor) -> Tensor:
        """diag(γ)(I − 11ᵀ/D) applied to tangents, …×D."""
        t = tangent - tangent.mean(-1, keepdim=True) if self.kind == "layer" else tangent
        gamma = self._parameters()[0]
        return t if gamma is None else t * gamma.to(t.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        """A weight (C×D) that reads the norm's output, moved before the constant map."""
        gamma = self._parameters()[0]
        w = weight if gamma is None else weight * gamma.to(weight.dtype)
        return w - w.mean(-1, keepdim=True) if self.kind == "layer" else w


@dataclass(frozen=True)
class Grouped:
    """A Jacobian that acts on equal parts of the last dimension, …×Q×groups×D of its own."""

    inner: Derivative
    groups: int

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ·cotangent."""
        return self._apply(self.inner.vjp, cotangent)

    def jvp(self, tangent: Tensor) -> Tensor:
        """J·tangent."""
        return self._apply(self.inner.jvp, tangent)

    def __getitem__(self, index: Any) -> Grouped:
        """Of one block, where the rows are L×…."""
        return Grouped(self.inner[index], self.groups)

    def _apply(self, function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        # …×Q×K×(G·d) to …×Q×G×K×d, as for Q·G rows.
        split = vectors.unflatten(-1, (self.groups, -1)).transpose(-2, -3)
        return function(split).transpose(-2, -3).flatten(-2)


def _kind(module: nn.Module) -> NormKind:
    name = type(module).__name__.lower()
    # timm's LayerNorm2d is an nn.LayerNorm that normalises channels instead.
    if isinstance(module, nn.LayerNorm) and "2d" not in name:
        return "layer"
    if "rmsnorm" in name and "2d" not in name:
        return "rms"
    if "simplenorm" in name and "2d" not in name:
        return "simple"
    raise UnsupportedModelError(
        f"{type(module).__qualname__} is no norm this library can read: "
        "layer norm, RMS norm and timm's SimpleNorm are supported."
    )
