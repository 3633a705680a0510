"""Steps of L alike blocks as one, against block by block; blocks that are not alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from readout.builders import LINEARS, NORMS, B, D, F, K, Q, drawn, rows
from timm.layers import RmsNorm
from torch import Tensor, nn

from captum_classemb.readout import (
    Activation,
    Gate,
    LayerScale,
    Linear,
    Norm,
    OutputPath,
    Scale,
    Step,
)
from captum_classemb.readout.activation import GatedActivation
from captum_classemb.readout.linear import SideBySide
from captum_classemb.readout.steps import stacked

L = 3


def numbers() -> Callable[[], Step]:
    """Each call a factor of its own."""
    gammas = iter((0.1, 0.3, 0.7))
    return lambda: Scale(next(gammas))


class Power(nn.Module):
    """An activation whose option is not shown by its name."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return x**self.exponent


STEPS: dict[str, Callable[[], Callable[[], Step]]] = {
    **{f"linear, {k}": lambda new=new: lambda: Linear(new()) for k, new in LINEARS.items()},
    **{f"norm, {k}": lambda new=new: lambda: Norm(new()) for k, new in NORMS.items()},
    "norm of each head": lambda: lambda: Norm(drawn(nn.LayerNorm(D // 2)), groups=2),
    "some columns": lambda: lambda: Linear(drawn(nn.Linear(2 * D, F)), slice(D, None)),
    "without the bias": lambda: lambda: Linear(drawn(nn.Linear(D, F)), biased=False),
    "side by side": lambda: (
        lambda: SideBySide((drawn(nn.Linear(D, F)), drawn(nn.Linear(D, 2, bias=False))))
    ),
    "scale": lambda: lambda: Scale(rows(D)),
    "layer scale": lambda: lambda: LayerScale(nn.Parameter(rows(D))),
    "one number": lambda: lambda: Scale(0.3),
    "numbers": numbers,
    "gate": lambda: lambda: Gate(rows()),
    "an activation of the user's": lambda: lambda: Activation(Power(3)),
    "activation": lambda: lambda: Activation(nn.GELU()),
    "gated activation": lambda: lambda: GatedActivation(nn.SiLU(), gate_last=True),
}


def assert_as_one(paths: Sequence[Sequence[Step]], lead: tuple[int, ...]) -> None:
    """Values and derivatives of the stack are those of the blocks one by one."""
    steps = stacked([[step.read() for step in path] for path in paths])
    assert steps is not None
    x = rows(len(paths), *lead, D)
    whole = OutputPath.of(steps, x)
    alone = [OutputPath.of(path, x[block]) for block, path in enumerate(paths)]
    t, c = rows(*x.shape[:-1], K, D), rows(*x.shape[:-1], K, whole.output.shape[-1])
    close: Any = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(whole.output, torch.stack([p.output for p in alone]), **close)
    biases = torch.stack([p.biases(c[block]) for block, p in enumerate(alone)])
    torch.testing.assert_close(whole.biases(c), biases, **close)
    for frozen in (False, True):
        vjp = torch.stack([p.vjp(c[block], frozen) for block, p in enumerate(alone)])
        jvp = torch.stack([p.jvp(t[block], frozen) for block, p in enumerate(alone)])
        torch.testing.assert_close(whole.vjp(c, frozen), vjp, **close)
        torch.testing.assert_close(whole.jvp(t, frozen), jvp, **close)
    # One block's derivative, taken out of the stack's.
    for block in range(len(paths)):
        out = t[block]
        for step, entering in zip(steps, whole.inputs, strict=True):
            out = step.at(entering)[block].jvp(out)
        torch.testing.assert_close(out, alone[block].jvp(t[block]), **close)


@pytest.mark.parametrize("count", [1, L])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_alike_blocks(name: str, count: int) -> None:
    new = STEPS[name]()
    assert_as_one([[new()] for _ in range(count)], (B, Q))


def a_whole_path() -> tuple[Step, ...]:
    """Every kind of step in a row, as a block with everything has them."""
    inner, norm = drawn(RmsNorm(D)), drawn(nn.LayerNorm(D))
    linear = drawn(nn.Linear(D, D))
    return Norm(inner), Gate(rows()), Linear(linear), LayerScale(rows(D)), Norm(norm)


@pytest.mark.parametrize("count", [1, L])
def test_paths_of_alike_blocks(count: int) -> None:
    assert_as_one([a_whole_path() for _ in range(count)], (B, Q))


def test_a_stack_does_not_follow_later_changes_of_the_model() -> None:
    module = drawn(nn.LayerNorm(D))
    other = drawn(nn.LayerNorm(D))
    steps = stacked([[Norm(m).read()] for m in (module, other)])
    assert steps is not None
    x = rows(2, B, Q, D)
    before = steps[0](x)
    with torch.no_grad():
        module.weight.mul_(2.0)
    assert torch.equal(steps[0](x), before)


class Learnt(nn.Module):
    """An activation with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.slope * x).sigmoid()


UNLIKE: dict[str, tuple[Step, Step]] = {
    "widths": (Linear(nn.Linear(D, F)), Linear(nn.Linear(D, F + 1))),
    "dtypes": (Linear(nn.Linear(D, F)), Linear(nn.Linear(D, F).double())),
    "biases": (Linear(nn.Linear(D, F)), Linear(nn.Linear(D, F, bias=False))),
    "kinds of step": (Scale(rows(D)), Linear(nn.Linear(D, D))),
    "kinds of scale": (Scale(rows(D)), LayerScale(rows(D))),
    "a number and a vector": (Scale(0.3), Scale(rows(D))),
    "kinds of norm": (Norm(nn.LayerNorm(D)), Norm(RmsNorm(D))),
    "eps": (Norm(nn.LayerNorm(D)), Norm(nn.LayerNorm(D, eps=1e-3))),
    "groups": (Norm(nn.LayerNorm(D)), Norm(nn.LayerNorm(D), groups=2)),
    "activations": (Activation(nn.GELU()), Activation(nn.GELU(approximate="tanh"))),
    "parameters of activations": (Activation(Learnt()), Activation(Learnt())),
    "options of activations": (Activation(Power(2)), Activation(Power(3))),
    "functions": (Activation(torch.tanh), Activation(torch.tanh)),
    "halves": (GatedActivation(nn.SiLU()), GatedActivation(nn.SiLU(), gate_last=True)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_not_alike_is_not_stacked(name: str) -> None:
    one, two = UNLIKE[name]
    assert stacked([[one.read()], [two.read()]]) is None
    # Nor where only a later step differs.
    same = Scale(0.5)
    assert stacked([[same, one.read()], [same, two.read()]]) is None
