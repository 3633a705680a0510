"""The small maps between a hidden state and what reads it: linear, scale, norm, gate.

A :class:`Step` knows its value and its derivative in closed form, and the affine map that remains
when σ is held at its actual value. Chains of steps carry a class direction from the logits back
to the place where attention writes (method: "one forward pass is enough").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional import norm as norm_fn
from captum_classemb.functional.norm import Normalised, NormKind
from captum_classemb.functional.precision import wide

__all__ = ["Chain", "Gate", "LayerScale", "Linear", "Norm", "Scale", "Step", "along"]


class Step(ABC):
    """One map of the last dimension: y = step(x), x and y …×Q×D."""

    #: True if the derivative is the same for every row, whatever x is.
    uniform: bool = True

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The value."""

    @abstractmethod
    def pull(self, x: Tensor, cotangent: Tensor, hold: bool = False) -> Tensor:
        """The cotangent of the input: Jᵀ·cotangent, with σ a constant if ``hold``."""

    def pull_rows(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """:meth:`pull` summed over rows: …×1×D."""
        if self.uniform:
            return self.pull(x, cotangent.sum(-2, keepdim=True))
        return self.pull(x, cotangent).sum(-2, keepdim=True)

    @abstractmethod
    def push(self, x: Tensor, tangent: Tensor, hold: bool = False) -> Tensor:
        """The tangent of the output: J·tangent, with σ a constant if ``hold``."""

    def offset(self) -> Tensor | None:
        """What the step adds by itself, computed from its biases; None if nothing."""
        return None


class Linear(Step):
    """A linear module; anything but a plain ``nn.Linear`` is used through the module alone.

    Args:
        module: maps B×Q×D_in to B×Q×D_out.
        columns: the columns of the weight that are read; all by default.
        biased: whether the module's bias belongs to this step.
    """

    def __init__(
        self, module: nn.Module, columns: slice | None = None, biased: bool = True
    ) -> None:
        self.module = module
        self.columns = columns
        self.biased = biased

    @property
    def plain(self) -> bool:
        """Whether the weight may be read: not so under LoRA, quantisation or a parametrisation."""
        module = self.module
        own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        return own and not getattr(module, "parametrizations", None)

    @property
    def weight(self) -> Tensor:
        """The weight (D_out×D_in) in float32 or wider."""
        module: Any = self.module
        weight = wide(module.weight.detach()) if self.plain else self._probe()[0]
        return weight if self.columns is None else weight[:, self.columns]

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the module itself applies them to unit vectors and to zero."""
        module: Any = self.module
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
        points = torch.eye(module.in_features, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            images = wide(module(torch.cat([torch.zeros_like(points[:1]), points])))
        return (images[1:] - images[0]).T, images[0]

    def __call__(self, x: Tensor) -> Tensor:
        y = x.to(self.weight.dtype) @ self.weight.T
        offset = self.offset()
        return y if offset is None else y + offset

    def pull(self, x: Tensor, cotangent: Tensor, hold: bool = False) -> Tensor:
        return cotangent @ self.weight

    def push(self, x: Tensor, tangent: Tensor, hold: bool = False) -> Tensor:
        return tangent @ self.weight.T

    def offset(self) -> Tensor | None:
        module: Any = self.module
        if not self.biased:
            return None
        if not self.plain:
            return self._probe()[1]
        return None if module.bias is None else wide(module.bias.detach())


class Scale(Step):
    """Multiplication by a vector or a number."""

    def __init__(self, gamma: Tensor | float) -> None:
        self.gamma = gamma

    def _factor(self, like: Tensor) -> Tensor | float:
        gamma = self.gamma
        return gamma.detach().to(like.dtype) if isinstance(gamma, Tensor) else gamma

    def __call__(self, x: Tensor) -> Tensor:
        return x * self._factor(x)

    def pull(self, x: Tensor, cotangent: Tensor, hold: bool = False) -> Tensor:
        return cotangent * self._factor(cotangent)

    def push(self, x: Tensor, tangent: Tensor, hold: bool = False) -> Tensor:
        return tangent * self._factor(tangent)


class LayerScale(Scale):
    """The scale of a whole branch: LayerScale, or the γ of CaiT, EVA and BEiT."""


class Gate(Step):
    """Multiplication by a gate of each row (…×Q×D), recorded in the forward pass and held."""

    uniform = False

    def __init__(self, gate: Tensor) -> None:
        self.gate = gate

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.gate.to(x.dtype)

    def pull(self, x: Tensor, cotangent: Tensor, hold: bool = False) -> Tensor:
        return cotangent * self.gate.to(cotangent.dtype)

    def push(self, x: Tensor, tangent: Tensor, hold: bool = False) -> Tensor:
        return tangent * self.gate.to(tangent.dtype)


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
        eps: Any = module.eps
        # nn.RMSNorm's eps may be None, which stands for that of the dtype it computes in.
        self.eps = None if eps is None else float(eps)

    def _parameter(self, name: str, like: Tensor) -> Tensor | None:
        tensor = getattr(self.module, name, None)
        return None if tensor is None else tensor.detach().to(like.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.unflatten(-1, (self.groups, -1))

    def _join(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.flatten(-2)

    def state(self, x: Tensor) -> Normalised:
        """The normalised input, in float32 or wider."""
        x = self._split(wide(x))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return norm_fn.normalise(x, eps, self.kind)

    def __call__(self, x: Tensor) -> Tensor:
        like = wide(x[..., :0])
        gamma, beta = self._parameter("weight", like), self._parameter("bias", like)
        if self.kind == "layer" and self.eps is not None:
            x = self._split(wide(x))
            return self._join(F.layer_norm(x, x.shape[-1:], gamma, beta, self.eps))
        y = self.state(x).x_hat
        y = y if gamma is None else y * gamma
        return self._join(y if beta is None else y + beta)

    def pull(self, x: Tensor, cotangent: Tensor, hold: bool = False) -> Tensor:
        c = self._split(cotangent)
        gamma = self._parameter("weight", c)
        return self._join(norm_fn.pull(c, self.state(x), gamma, self.kind, hold))

    def pull_rows(self, x: Tensor, cotangent: Tensor) -> Tensor:
        if self.groups > 1:
            return super().pull_rows(x, cotangent)
        gamma = self._parameter("weight", cotangent)
        return norm_fn.pull_rows(cotangent, self.state(x), gamma, self.kind)

    def push(self, x: Tensor, tangent: Tensor, hold: bool = False) -> Tensor:
        t = self._split(tangent)
        gamma = self._parameter("weight", t)
        return self._join(norm_fn.push(t, self.state(x), gamma, self.kind, hold))

    def offset(self) -> Tensor | None:
        beta = getattr(self.module, "bias", None)
        return None if beta is None else wide(beta.detach()).repeat(self.groups)

    # -- The same in two halves, for tangents of all source tokens at once: what depends on the
    # rows, and the constant map diag(γ)(I − 11ᵀ/D), which can be folded into a weight that reads.

    def push_mean(self, x: Tensor, tangent: Tensor, hold: bool = False) -> Tensor:
        """The mean over rows of J_q·tangent before the constant map; one tangent for all rows.

        Args:
            x: the rows, B×Q×D.
            tangent: B×N×D.
            hold: treat σ as a constant.

        Returns:
            B×N×D, without ever forming Q×N×D.
        """
        x_hat, slope, inverse = self.state(x)
        rows, width = x.shape[-2:]
        moved = tangent * inverse.mean(-2, keepdim=True)
        if hold:
            return moved
        along = tangent @ slope.transpose(-2, -1) * inverse.transpose(-2, -1)
        return moved.baddbmm_(along, x_hat, alpha=-1.0 / (rows * width))

    def constant(self, vector: Tensor) -> Tensor:
        """diag(γ)(I − 11ᵀ/D) applied to tangents, …×D."""
        t = vector - vector.mean(-1, keepdim=True) if self.kind == "layer" else vector
        gamma = self._parameter("weight", t)
        return t if gamma is None else t * gamma

    def fold(self, weight: Tensor) -> Tensor:
        """A weight (C×D) that reads the norm's output, moved before the constant map."""
        gamma = self._parameter("weight", weight)
        w = weight if gamma is None else weight * gamma
        return w - w.mean(-1, keepdim=True) if self.kind == "layer" else w


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


@dataclass(frozen=True)
class Chain:
    """Steps in a row, with the values they had at some rows of one forward pass.

    Attributes:
        steps: the maps, first to last.
        trace: the input of every step (B×Q×·), then the output of the last. A uniform step's
            input may be empty, since its derivative does not depend on it.
    """

    steps: tuple[Step, ...]
    trace: tuple[Tensor, ...]

    @classmethod
    def of(cls, steps: Sequence[Step], x: Tensor) -> Chain:
        """Run the steps from ``x``."""
        trace = [x]
        for step in steps:
            trace.append(step(trace[-1]))
        return cls(tuple(steps), tuple(trace))

    @property
    def output(self) -> Tensor:
        """What the last step returned."""
        return self.trace[-1]

    @property
    def uniform(self) -> bool:
        """Whether the derivative is the same for every row."""
        return all(step.uniform for step in self.steps)

    def before_layer_scale(self) -> Chain:
        """The chain up to LayerScale, which is where the published code reads a branch."""
        for index, step in enumerate(self.steps):
            if isinstance(step, LayerScale):
                return Chain(self.steps[:index], self.trace[: index + 1])
        return self

    def since(self, kind: type[Step]) -> Chain:
        """The chain from the last step of a kind on."""
        index = max(i for i, step in enumerate(self.steps) if isinstance(step, kind))
        return Chain(self.steps[index:], self.trace[index:])

    def pull(self, cotangent: Tensor, hold: bool = False) -> Tensor:
        """The cotangent of the first input."""
        for step, x in zip(reversed(self.steps), reversed(self.trace[:-1]), strict=True):
            cotangent = step.pull(x, cotangent, hold)
        return cotangent

    def pull_rows(self, cotangent: Tensor) -> Tensor:
        """The cotangent of the first input summed over rows: B×·."""
        for index in reversed(range(len(self.steps))):
            step, x = self.steps[index], self.trace[index]
            # Where all that is left treats every row alike, one row stands for the sum.
            alike = all(earlier.uniform for earlier in self.steps[:index])
            cotangent = step.pull_rows(x, cotangent) if alike else step.pull(x, cotangent)
        return cotangent.sum(1)

    def push(self, tangent: Tensor, hold: bool = False) -> Tensor:
        """The tangent of the output; with one recorded row, B×N×· tangents share it."""
        for step, x in zip(self.steps, self.trace[:-1], strict=True):
            tangent = step.push(x, tangent, hold)
        return tangent

    def pull_offsets(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Carry a cotangent back with σ held, and gather what the biases of the steps add.

        Returns:
            the cotangent of the first input (B×Q×·), and Σ over steps and rows of
            bias · cotangent (B).
        """
        total = cotangent.new_zeros(cotangent.shape[0])
        for step, x in zip(reversed(self.steps), reversed(self.trace[:-1]), strict=True):
            total = total + along(step.offset(), cotangent)
            cotangent = step.pull(x, cotangent, hold=True)
        return cotangent, total


def along(offset: Tensor | None, cotangent: Tensor) -> Tensor:
    """Offset · cotangent summed over rows: D and B×Q×D to B."""
    if offset is None:
        return cotangent.new_zeros(cotangent.shape[0])
    return (cotangent @ offset.to(cotangent.dtype)).sum(-1)
