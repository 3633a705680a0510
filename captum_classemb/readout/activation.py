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

_GELU = ("GELU", "GELUActivation")
_GELU_TANH = ("GELUTanh", "NewGELUActivation", "PytorchGELUTanh", "GELUTanhActivation")
_QUICK_GELU = ("QuickGELU", "QuickGELUActivation")
_SILU = ("SiLU", "SiLUActivation")
_KNOWN = {*_GELU, *_GELU_TANH, *_QUICK_GELU, *_SILU, "ReLU"}


class Activation(Step):
    """An elementwise function, its derivative in closed form where it is a known one.

    Frozen, it is x times its gate f(x)/x.

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
        y: Tensor = function(x.clone() if getattr(self.function, "inplace", False) else x)
        return y

    def at(self, x: Tensor, frozen: bool = False) -> Diagonal:
        return Diagonal((self.gate(x) if frozen else self.slope(x))[..., None, :])

    def gate(self, x: Tensor) -> Tensor:
        """f(x)/x, what the activation multiplies x by; its limit where x is 0: …×D."""
        x = x + 1e-30
        return self(x) / x

    @property
    def gates(self) -> bool:
        """Whether f(0) = 0, so that f is x times a factor."""
        if self._name() in _KNOWN:
            return True
        like = next(getattr(self.function, "parameters", lambda: iter(()))(), torch.zeros(()))
        with torch.no_grad():
            return not self(torch.zeros_like(like.detach().reshape(-1)[:1])).any()

    def _name(self) -> str:
        """The name of the function's class where it is a library's own."""
        kind = type(self.function)
        known = kind.__module__.startswith(("torch.", "timm.", "transformers."))
        return kind.__name__ if known and "forward" not in vars(self.function) else ""

    def slope(self, x: Tensor) -> Tensor:
        """The derivative at x, …×D."""
        name, aten = self._name(), torch.ops.aten
        one = torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
        slope: Tensor | None = None
        if name in _GELU:
            approximate = getattr(self.function, "approximate", "none")
            slope = aten.gelu_backward(one, x, approximate=approximate)
        elif name in _GELU_TANH:
            slope = aten.gelu_backward(one, x, approximate="tanh")
        elif name in _QUICK_GELU:
            slope = aten.silu_backward(one, x * 1.702)
        elif name in _SILU:
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
    """act(a)·b of the two halves of the last dimension, or a·act(b) if ``gate_last``.

    Frozen, it is half of act(a)/a·b as a factor of a, and half of act(a) as a factor of b; act(a)
    as a factor of b alone where act(0) is not 0, as for a sigmoid.
    """

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
        if frozen and self.act.gates:
            factors = self.act.gate(gate) * other / 2, self.act(gate) / 2
        elif frozen:
            factors = torch.zeros_like(gate), self.act(gate)
        else:
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
