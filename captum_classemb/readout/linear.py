"""Linear layers as steps, read through their modules where they are not plain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.functional.precision import upcast
from captum_classemb.readout.derivatives import Matrix, product
from captum_classemb.readout.steps import Step, shape_of, together

__all__ = [
    "Linear",
    "SideBySide",
    "Slice",
]


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
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that are called."""
        return (self.module,)

    def gathered(self, outputs: Sequence[Tensor]) -> Tensor:
        """The step's value from what :attr:`modules` returned."""
        return outputs[0]

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
        return Linear, weight.shape, weight.dtype, shape_of(bias)

    def stack(self, steps: Sequence[Any]) -> Linear:
        weights, biases = zip(*(step._parameters() for step in steps), strict=True)
        step = copy.copy(self)
        step._read = cast(Tensor, together(weights)), together(biases)
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

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(part.module for part in self.parts)

    def gathered(self, outputs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(outputs), -1)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        if self._read is not None:
            return self._read
        weights, biases = zip(*(part._parameters() for part in self.parts), strict=True)
        some = [
            torch.zeros(len(w), dtype=w.dtype, device=w.device) if b is None else b
            for w, b in zip(weights, biases, strict=True)
        ]
        return torch.cat(weights), torch.cat(some)


class Slice(Linear):
    """Some of what a linear module returns, with a bias of their own where there is one.

    Args:
        module: maps B×Q×D_in to B×Q×D_out.
        outputs: which of the D_out.
        bias: added to them.
    """

    def __init__(self, module: nn.Module, outputs: slice, bias: Tensor | None = None) -> None:
        super().__init__(module)
        self.outputs, self.bias = outputs, bias

    def gathered(self, outputs: Sequence[Tensor]) -> Tensor:
        some = outputs[0][..., self.outputs]
        return some if self.bias is None else some + self.bias

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        if self._read is not None:
            return self._read
        weight, bias = super()._parameters()
        own = None if self.bias is None else upcast(self.bias.detach())
        if bias is not None:
            own = bias[self.outputs] if own is None else bias[self.outputs] + own
        return weight[self.outputs], own
