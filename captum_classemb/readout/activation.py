"""Activations as steps, gated ones too, their slopes in closed form where they are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.readout.derivatives import Diagonal
from captum_classemb.readout.steps import Step

__all__ = [
    "Activation",
    "GatedActivation",
    "GatedDerivative",
]


class Activation(Step):
    """An elementwise function, its derivative in closed form where it is a known one.

    Args:
        function: the module.
    """

    uniform = False

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def likeness(self) -> tuple[Any, ...] | None:
        function = self.function
        if not isinstance(function, nn.Module):
            return None
        if function._modules or function._parameters or function._buffers:
            return None
        options = {k: v for k, v in vars(function).items() if not k.startswith("_")}
        options.pop("training")
        plain = not any(isinstance(v, Tensor) for v in options.values())
        return (Activation, type(function), options) if plain else None

    def stack(self, steps: Sequence[Any]) -> Activation:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        # Not called as a module: hooks are for what the model computes.
        function = self.function.forward if isinstance(self.function, nn.Module) else self.function
        y: Tensor = function(x)
        return y

    def at(self, x: Tensor, frozen: bool = False) -> Diagonal:
        return Diagonal(self.slope(x)[..., None, :])

    def slope(self, x: Tensor) -> Tensor:
        """The derivative at x, …×D."""
        kind, aten = type(self.function), torch.ops.aten
        known = kind.__module__.startswith(("torch.", "timm.", "transformers."))
        name = kind.__name__ if known and "forward" not in vars(self.function) else ""
        one = torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
        slope: Tensor | None = None
        if name in ("GELU", "GELUActivation"):
            approximate = getattr(self.function, "approximate", "none")
            slope = aten.gelu_backward(one, x, approximate=approximate)
        elif name in ("GELUTanh", "NewGELUActivation", "PytorchGELUTanh", "GELUTanhActivation"):
            slope = aten.gelu_backward(one, x, approximate="tanh")
        elif name in ("QuickGELU", "QuickGELUActivation"):
            slope = aten.silu_backward(one, x * 1.702)
        elif name in ("SiLU", "SiLUActivation"):
            slope = aten.silu_backward(one, x)
        elif name == "ReLU":
            slope = (x > 0).to(x.dtype)
        if slope is not None:
            return slope
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self(leaf).sum(), leaf)
        return slope


class GatedActivation(Step):
    """act(a)·b of the two halves of the last dimension, or a·act(b) if ``gate_last``."""

    uniform = False

    def __init__(self, function: Callable[[Tensor], Tensor], gate_last: bool = False) -> None:
        self.act = Activation(function)
        self.gate_last = gate_last

    def likeness(self) -> tuple[Any, ...] | None:
        known = self.act.likeness()
        return None if known is None else (GatedActivation, self.gate_last, *known)

    def stack(self, steps: Sequence[Any]) -> GatedActivation:
        return self

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        return (b, a) if self.gate_last else (a, b)

    def __call__(self, x: Tensor) -> Tensor:
        gate, other = self._halves(x)
        return self.act(gate) * other

    def at(self, x: Tensor, frozen: bool = False) -> GatedDerivative:
        gate, other = self._halves(x)
        factors = self.act.slope(gate) * other, self.act(gate)
        return GatedDerivative(torch.cat(factors[::-1] if self.gate_last else factors, -1))


@dataclass(frozen=True)
class GatedDerivative:
    """The Jacobian of a product of two halves: both factors side by side, …×Q×2D."""

    factors: Tensor

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ·cotangent."""
        return torch.cat([cotangent, cotangent], -1) * self.factors[..., None, :]

    def jvp(self, tangent: Tensor) -> Tensor:
        """J·tangent."""
        a, b = (tangent * self.factors[..., None, :]).chunk(2, -1)
        return a + b

    def __getitem__(self, index: Any) -> GatedDerivative:
        """Of one block, where the factors are L×…."""
        return GatedDerivative(self.factors[index])
