"""Jacobians at some rows: of factors and of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Derivative",
    "Diagonal",
    "GateDerivative",
    "Matrix",
    "lifted",
    "product",
]


class Derivative(Protocol):
    """A Jacobian at some rows, applied to K vectors of each: …×Q×K×D."""

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ·cotangent."""
        ...

    def jvp(self, tangent: Tensor) -> Tensor:
        """J·tangent."""
        ...

    def __getitem__(self, index: Any) -> Derivative:
        """Of one of L blocks."""
        ...


@dataclass(frozen=True)
class Diagonal:
    """The Jacobian of a product with a factor."""

    factor: Tensor | float

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ·cotangent."""
        return cotangent * self.factor

    jvp = vjp

    def __getitem__(self, index: Any) -> Diagonal:
        """Of one block, where the factor is L×…."""
        one = isinstance(self.factor, float) or self.factor.dim() < 2
        return self if one else Diagonal(self.factor[index])  # type: ignore[index]


class GateDerivative(Diagonal):
    """The Jacobian of a product with a frozen gate."""

    def __getitem__(self, index: Any) -> GateDerivative:
        assert isinstance(self.factor, Tensor)
        return GateDerivative(self.factor[index])


@dataclass(frozen=True)
class Matrix:
    """The Jacobian of a linear map with the weight D_out×D_in, or one for each of L blocks."""

    weight: Tensor

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ·cotangent."""
        return product(cotangent, self.weight)

    def jvp(self, tangent: Tensor) -> Tensor:
        """J·tangent."""
        return product(tangent, self.weight.mT)

    def __getitem__(self, index: Any) -> Matrix:
        """Of one of L blocks."""
        return Matrix(self.weight[index])


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """…×I times I×O, or L×…×I times L×I×O."""
    if matrix.dim() == 2:
        return x @ matrix
    by_block: Tensor = torch.bmm(x.flatten(1, -2), matrix).unflatten(1, x.shape[1:-1])
    return by_block


def lifted(parameter: Tensor, dims: int) -> Tensor:
    """A parameter D, or L×D, so that it meets rows of ``dims`` dimensions."""
    if parameter.dim() == 1:
        return parameter
    return parameter.view(len(parameter), *(1,) * (dims - 2), parameter.shape[-1])
