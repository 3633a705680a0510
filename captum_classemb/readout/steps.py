"""The small maps between a hidden state and what reads it: linear, scale, norm, gate, activation.

A :class:`Step` knows its value and its derivative in closed form. Steps of alike blocks can be
stacked: their parameters then begin with a dimension L, as do the rows they take, so that one
product serves all blocks.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.norm import Normalised, NormJacobian, NormKind, normalise
from captum_classemb.functional.precision import upcast

__all__ = [
    "Activation",
    "Derivative",
    "Gate",
    "GatedActivation",
    "LayerScale",
    "Linear",
    "Norm",
    "OutputPath",
    "Scale",
    "SideBySide",
    "Step",
    "along",
    "stacked",
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
        return product(cotangent, self.weight)

    def jvp(self, tangent: Tensor) -> Tensor:
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


def _together(tensors: Sequence[Tensor | None]) -> Tensor | None:
    if tensors[0] is None:
        return None
    # One block's parameters need no copy.
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))  # type: ignore[arg-type]


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


class Linear(Step):
    """A linear module; anything but a plain ``nn.Linear`` is used through the module alone.

    Args:
        module: maps B×Q×D_in to B×Q×D_out.
        columns: the columns of the weight that are read; all by default.
        biased: whether the module's bias belongs to this step.
        names: of the module's weight and bias, where it is no ``nn.Linear``.
    """

    def __init__(
        self,
        module: nn.Module,
        columns: slice | None = None,
        biased: bool = True,
        names: tuple[str, str] | None = None,
    ) -> None:
        self.module = module
        self.columns = columns
        self.biased = biased
        self.names = names
        self._read: tuple[Tensor, Tensor | None] | None = None

    @property
    def plain(self) -> bool:
        """Whether the weight may be read: not so under LoRA, quantisation or a parametrisation."""
        module = self.module
        if self.names is not None:
            return True
        own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        return own and "forward" not in vars(module) and not hasattr(module, "parametrizations")

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        if self._read is not None:
            return self._read
        module: Any = self.module
        if self.plain:
            names = self.names or ("weight", "bias")
            weight, bias = (getattr(module, name) for name in names)
        else:
            weight, bias = self._probe()
        weight = upcast(weight.detach())
        weight = weight if self.columns is None else weight[:, self.columns]
        return weight, None if bias is None or not self.biased else upcast(bias.detach())

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the module itself applies them to unit vectors and to zero."""
        module: Any = self.module
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
        points = torch.eye(module.in_features, dtype=like.dtype, device=like.device)
        # Not called as a module: hooks are for what the model computes.
        with torch.no_grad():
            images = upcast(module.forward(torch.cat([torch.zeros_like(points[:1]), points])))
        return (images[1:] - images[0]).T, images[0]

    def read(self) -> Linear:
        step = copy.copy(self)
        step._read = self._parameters()
        return step

    def likeness(self) -> tuple[Any, ...] | None:
        weight, bias = self._parameters()
        return Linear, weight.shape, weight.dtype, _shape(bias)

    def stack(self, steps: Sequence[Any]) -> Linear:
        weights, biases = zip(*(step._parameters() for step in steps), strict=True)
        step = copy.copy(self)
        step._read = cast(Tensor, _together(weights)), _together(biases)
        return step

    @property
    def weight(self) -> Tensor:
        """The weight (D_out×D_in, or L×D_out×D_in) in float32 or wider."""
        return self._parameters()[0]

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters()
        x = x.to(weight.dtype)
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        if bias is None:
            return product(x, weight.mT)
        y = torch.baddbmm(bias[:, None], x.flatten(1, -2), weight.mT)
        by_block: Tensor = y.unflatten(1, x.shape[1:-1])
        return by_block

    def at(self, x: Tensor, frozen: bool = False) -> Matrix:
        return Matrix(self.weight)

    def offset(self) -> Tensor | None:
        return self._parameters()[1]


class SideBySide(Linear):
    """Several linear modules that read the same, their outputs side by side.

    Args:
        modules: each maps B×Q×D_in to B×Q×D_out.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules[0])
        self.parts = tuple(map(Linear, modules))

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        if self._read is not None:
            return self._read
        weights, biases = zip(*(part._parameters() for part in self.parts), strict=True)
        some = [
            torch.zeros(len(w), dtype=w.dtype, device=w.device) if b is None else b
            for w, b in zip(weights, biases, strict=True)
        ]
        return torch.cat(weights), torch.cat(some)


class Scale(Step):
    """Multiplication by a vector or a number, or by one for each of L blocks."""

    def __init__(self, gamma: Tensor | float | tuple[float, ...]) -> None:
        self.gamma = gamma

    def read(self) -> Scale:
        gamma = self.gamma
        return type(self)(upcast(gamma.detach()) if isinstance(gamma, Tensor) else gamma)

    def likeness(self) -> tuple[Any, ...] | None:
        gamma = self.gamma
        return type(self), _shape(gamma) if isinstance(gamma, Tensor) else "number"

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
        return Gate, _shape(self.gate)

    def stack(self, steps: Sequence[Any]) -> Gate:
        return Gate(torch.stack([step.gate for step in steps]))

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.gate.to(x.dtype)

    def at(self, x: Tensor, frozen: bool = False) -> GateDerivative:
        return GateDerivative(self.gate[..., None, :])


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
        return torch.cat([cotangent, cotangent], -1) * self.factors[..., None, :]

    def jvp(self, tangent: Tensor) -> Tensor:
        a, b = (tangent * self.factors[..., None, :]).chunk(2, -1)
        return a + b

    def __getitem__(self, index: Any) -> GatedDerivative:
        """Of one block, where the factors are L×…."""
        return GatedDerivative(self.factors[index])


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
        return Norm, self.kind, self.groups, self.eps, *map(_shape, self._parameters())

    def stack(self, steps: Sequence[Any]) -> Norm:
        gammas, betas = zip(*(step._parameters() for step in steps), strict=True)
        step = copy.copy(self)
        step._read = _together(gammas), _together(betas)
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
        return self._apply(self.inner.vjp, cotangent)

    def jvp(self, tangent: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class OutputPath:
    """Steps in a row from a branch's product to the residual stream, with what entered each.

    Attributes:
        steps: the maps, first to last.
        inputs: what entered each step at some rows of one forward pass (…×Q×·). It may be empty
            for a step whose derivative does not depend on it.
        output: what the last step returned.
    """

    steps: tuple[Step, ...]
    inputs: tuple[Tensor, ...]
    output: Tensor

    @classmethod
    def of(cls, steps: Sequence[Step], x: Tensor) -> OutputPath:
        """Run the steps from ``x``."""
        inputs = []
        for step in steps:
            inputs.append(x)
            x = step(x)
        return cls(tuple(steps), tuple(inputs), x)

    @property
    def uniform(self) -> bool:
        """Whether the derivative is the same for every row."""
        return all(step.uniform for step in self.steps)

    def before_layer_scale(self) -> OutputPath:
        """The path up to LayerScale, which is where the published code reads a branch."""
        for index, step in enumerate(self.steps):
            if isinstance(step, LayerScale):
                return OutputPath(self.steps[:index], self.inputs[:index], self.inputs[index])
        return self

    def since(self, kind: type[Step]) -> OutputPath:
        """The path from the last step of a kind on."""
        index = max(i for i, step in enumerate(self.steps) if isinstance(step, kind))
        return OutputPath(self.steps[index:], self.inputs[index:], self.output)

    def vjp(self, cotangent: Tensor, frozen: bool = False) -> Tensor:
        """The cotangents of the first input, …×Q×K×·, with every σ a constant if ``frozen``."""
        for step, x in zip(reversed(self.steps), reversed(self.inputs), strict=True):
            cotangent = step.at(x, frozen).vjp(cotangent)
        return cotangent

    def jvp(self, tangent: Tensor, frozen: bool = False) -> Tensor:
        """The tangents of the output, …×Q×K×·."""
        for step, x in zip(self.steps, self.inputs, strict=True):
            tangent = step.at(x, frozen).jvp(tangent)
        return tangent

    def biases(self, cotangent: Tensor) -> Tensor:
        """Σ over steps and rows of bias · cotangent, with every σ frozen: …×K."""
        total = along(None, cotangent)
        for step, x in zip(reversed(self.steps), reversed(self.inputs), strict=True):
            total = total + along(step.offset(), cotangent)
            cotangent = step.at(x, frozen=True).vjp(cotangent)
        return total


def along(offset: Tensor | None, cotangent: Tensor) -> Tensor:
    """Offset · cotangent summed over rows: D or L×D and …×Q×K×D to …×K."""
    if offset is None:
        return cotangent.new_zeros((*cotangent.shape[:-3], cotangent.shape[-2]))
    return (cotangent * lifted(offset.to(cotangent.dtype), cotangent.dim())).sum((-3, -1))
