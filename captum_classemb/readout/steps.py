"""The small maps between a hidden state and what reads it: what they share, and factors.

A :class:`Step` knows its value and its derivative in closed form. Steps of alike blocks can be
stacked: their parameters then begin with a dimension L, as do the rows they take, so that one
product serves all blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_classemb.functional.precision import upcast
from captum_classemb.readout.derivatives import Derivative, Diagonal, GateDerivative, lifted

__all__ = [
    "Gate",
    "LayerScale",
    "Scale",
    "Step",
    "shape_of",
    "stacked",
    "together",
]


class Step(ABC):
    """One map of the last dimension: y = step(x), x and y …×Q×D."""

    #: True if the derivative is the same for every row, whatever x is.
    uniform: bool = True

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The value."""

    @abstractmethod
    def at(self, x: Tensor, frozen: bool = False) -> Derivative:
        """The derivative at some rows, with σ a constant if ``frozen``."""

    def linearised(self, x: Tensor) -> tuple[Tensor, Derivative]:
        """The value and the derivative together."""
        return self(x), self.at(x)

    def offset(self) -> Tensor | None:
        """What the step adds by itself, computed from its biases: D or L×D; None if nothing."""
        return None

    def read(self) -> Step:
        """The step with its parameters as they are now, in float32 or wider, read once."""
        return self

    def likeness(self) -> tuple[Any, ...] | None:
        """What two steps share if :meth:`stack` can join them; None if nothing can."""
        return None

    def stack(self, steps: Sequence[Any]) -> Step:
        """Steps of L blocks, all read and alike, as one."""
        raise NotImplementedError


def stacked(paths: Sequence[Sequence[Step]]) -> tuple[Step, ...] | None:
    """The steps of L blocks as one for all, or None where they are not alike."""
    likeness = [tuple(step.likeness() for step in path) for path in paths]
    if any(None in each or each != likeness[0] for each in likeness):
        return None
    return tuple(column[0].stack(column) for column in zip(*paths, strict=True))


def together(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The parameters of L blocks as one, L×…; None where there are none."""
    if tensors[0] is None:
        return None
    # One block's parameters need no copy.
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))  # type: ignore[arg-type]


def shape_of(tensor: Tensor | None) -> tuple[int, ...] | None:
    """The shape of a parameter; None where there is none."""
    return None if tensor is None else tuple(tensor.shape)


class Scale(Step):
    """Multiplication by a vector or a number, or by one for each of L blocks."""

    def __init__(self, gamma: Tensor | float | tuple[float, ...]) -> None:
        self.gamma = gamma

    def read(self) -> Scale:
        gamma = self.gamma
        return type(self)(upcast(gamma.detach()) if isinstance(gamma, Tensor) else gamma)

    def likeness(self) -> tuple[Any, ...] | None:
        gamma = self.gamma
        return type(self), shape_of(gamma) if isinstance(gamma, Tensor) else "number"

    def stack(self, steps: Sequence[Any]) -> Scale:
        gammas = [step.gamma for step in steps]
        if isinstance(gammas[0], Tensor):
            return type(self)(torch.stack(gammas))
        return self if len(set(gammas)) == 1 else type(self)(tuple(gammas))

    def _factor(self, dtype: torch.dtype, device: torch.device, dims: int) -> Tensor | float:
        gamma = self.gamma
        if isinstance(gamma, tuple):
            # Filled in on the device, which a copy from the host would make wait.
            each = [torch.full((1,), number, dtype=dtype, device=device) for number in gamma]
            return lifted(torch.stack(each), dims)
        if not isinstance(gamma, Tensor):
            return gamma
        return lifted(gamma.detach().to(device, dtype), dims)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self._factor(x.dtype, x.device, x.dim())

    def at(self, x: Tensor, frozen: bool = False) -> Diagonal:
        return Diagonal(self._factor(x.dtype, x.device, x.dim() + 1))


class LayerScale(Scale):
    """The scale of a whole branch: LayerScale, or the γ of CaiT, EVA and BEiT."""


class Gate(Step):
    """Multiplication by a gate of each row (…×Q×D), recorded in the forward pass and frozen."""

    uniform = False

    def __init__(self, gate: Tensor) -> None:
        self.gate = gate

    def read(self) -> Gate:
        return Gate(upcast(self.gate))

    def likeness(self) -> tuple[Any, ...] | None:
        return Gate, shape_of(self.gate)

    def stack(self, steps: Sequence[Any]) -> Gate:
        return Gate(torch.stack([step.gate for step in steps]))

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.gate.to(x.dtype)

    def at(self, x: Tensor, frozen: bool = False) -> GateDerivative:
        return GateDerivative(self.gate[..., None, :])
