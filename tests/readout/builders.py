"""Modules in double precision with every parameter drawn at random, and rows they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import RmsNorm, SimpleNorm
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune

B, Q, D, F, K = 2, 3, 6, 4, 2


class LowRank(nn.Module):
    """A linear layer with an adapter beside it, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, F)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, F, bias=False)
        self.in_features, self.out_features = D, F

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # what a careless reader would take

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def drawn(module: Any) -> Any:
    """The module in double precision, every parameter at random."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def pruned() -> nn.Module:
    linear: nn.Module = prune.random_unstructured(drawn(nn.Linear(D, F)), "weight", amount=0.5)
    return linear


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: drawn(nn.Linear(D, F)),
    "no bias": lambda: drawn(nn.Linear(D, F, bias=False)),
    "of multi-head attention": lambda: drawn(NonDynamicallyQuantizableLinear(D, F)),
    "low rank": lambda: drawn(LowRank()),
    "parametrised": lambda: parametrizations.weight_norm(drawn(nn.Linear(D, F))),
    "pruned": pruned,
}

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: drawn(nn.LayerNorm(D)),
    "layer, no bias": lambda: drawn(nn.LayerNorm(D, bias=False)),
    "layer, no parameters": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "rms of torch": lambda: drawn(nn.RMSNorm(D, eps=1e-3)),
    "rms of torch, default eps": lambda: drawn(nn.RMSNorm(D)),
    "rms of timm": lambda: drawn(RmsNorm(D)),
    "simple": lambda: drawn(SimpleNorm(D)),
}


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, Q, D)), dtype=torch.float64)


def each(function: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor, way: str) -> Tensor:
    """The derivative by autograd, for K vectors of each row one by one: …×Q×K×·.

    Args:
        function: …×Q×D to …×Q×F.
        x: where, …×Q×D.
        vectors: …×Q×K×F for ``"vjp"``, …×Q×K×D for ``"jvp"``.
        way: which.
    """
    by_autograd = getattr(torch.autograd.functional, way)
    return torch.stack([by_autograd(function, x, v)[1] for v in vectors.unbind(-2)], -2)
