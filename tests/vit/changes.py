"""The frame of a catalogue of changes of a model: each exact or refused, never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vit.changed import LIBRARIES, Parts, random_images, small

TIMM = ("timm",)
#: Where what is changed is the same in every library, one beside timm is enough.
WITH_TORCHVISION = ("timm", "torchvision")
WITH_HUGGING_FACE = ("timm", "hugging face")
EXACT = frozenset({"exact"})
REFUSED = frozenset({"refused"})
EITHER = EXACT | REFUSED


@dataclass(frozen=True)
class Change:
    """One kind of change.

    ``apply`` changes the parts' model, or returns another model; it may return a function that
    undoes what outlives the model. ``make`` builds the model before the change.
    """

    name: str
    allowed: frozenset[str]
    apply: Callable[[Parts], Any]
    libraries: tuple[str, ...] = LIBRARIES
    late: bool = True  # whether it is also made after the first call
    make: Callable[[str], nn.Module] = small
    images: Callable[[], Tensor] = random_images
    names: str = ""  # what a refusal by verification must name


CHANGES: list[Change] = []


def change(name: str, allowed: frozenset[str], **options: Any) -> Callable[..., Any]:
    """Add a function to the catalogue."""

    def add(apply: Callable[[Parts], Any]) -> Callable[[Parts], Any]:
        # A module that is collected for its examples too is imported twice.
        again = any(
            known.name == name and _place(known.apply) == _place(apply) for known in CHANGES
        )
        if not again:
            CHANGES.append(Change(name, allowed, apply, **options))
        return apply

    return add


def _place(function: Any) -> tuple[str, int]:
    code = function.__code__
    return code.co_filename, code.co_firstlineno


def scaled(module: Any, by: float = 1.3) -> None:
    """The module's forward is replaced by one that scales its first output."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: _first(lambda x: by * x, forward(*args, **kwargs))


def _first(edit: Callable[[Tensor], Tensor], output: Any) -> Any:
    return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)


def hooked(module: Any, edit: Callable[[Tensor], Tensor]) -> None:
    """A user's hook edits what the module returns."""
    module.register_forward_hook(lambda _, __, output: _first(edit, output))


def entered(module: Any, edit: Callable[[Tensor], Tensor]) -> None:
    """A user's hook edits what the module is given; self-attention is given it three times."""

    def hook(_: Any, args: Any) -> Any:
        x = edit(args[0])
        return tuple(x if arg is args[0] else arg for arg in args)

    module.register_forward_pre_hook(hook)


def vector(seed: int = 7, width: int = 32) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(9)
    return nn.Linear(inputs, outputs).double()


def after_first(x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The edit, of all images but the first."""
    return torch.cat([x[:1], edit(x[1:])])


def shuffled(x: Tensor) -> Tensor:
    """Patch tokens in another order; CLS stays in front."""
    return torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)


class Wrapped(nn.Module):
    """A module inside another, whose output is scaled."""

    def __init__(self, inner: nn.Module, by: float = 1.0) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _first(lambda x: self.by * x, self.inner(*args, **kwargs))


class LowRank(nn.Module):
    """A linear layer and a low-rank update beside it, written by hand."""

    def __init__(self, base: Any, rank: int = 2) -> None:
        super().__init__()
        self.base, self.by = base, 0.7
        self.down, self.up = linear(base.in_features, rank), linear(rank, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        updated: Tensor = self.base(x) + self.by * self.up(self.down(x))
        return updated


class Times(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight
