"""Steps: values, derivatives and offsets against torch's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from readout.builders import LINEARS, NORMS, B, D, F, K, Q, drawn, each, rows
from timm.layers import LayerNorm2d
from timm.layers.activations import GELUTanh, QuickGELU
from torch import Tensor, nn
from transformers.activations import ACT2FN

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.readout import Activation, Gate, LayerScale, Linear, Norm, Scale, Step
from captum_classemb.readout.activation import GatedActivation
from captum_classemb.readout.linear import SideBySide


def check(step: Step, module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Value and both derivatives of a step are those of a function."""
    y = module(x).detach()
    assert torch.allclose(step(x), y, rtol=1e-11, atol=1e-11)
    c, t = rows(*y.shape[:-1], K, y.shape[-1]), rows(*x.shape[:-1], K, x.shape[-1])
    derivative = step.at(x)
    vjp, jvp = each(module, x, c, "vjp"), each(module, x, t, "jvp")
    assert torch.allclose(derivative.vjp(c), vjp, rtol=1e-10, atol=1e-11)
    assert torch.allclose(derivative.jvp(t), jvp, rtol=1e-10, atol=1e-11)
    # A copy of the parameters as they are now.
    assert torch.equal(step.read()(x), step(x))


@pytest.mark.parametrize("name", LINEARS)
def test_linear(name: str) -> None:
    module = LINEARS[name]()
    step, x = Linear(module), rows()
    check(step, module, x)
    offset = step.offset()
    at_zero = module(torch.zeros(1, D, dtype=torch.float64))[0]
    assert torch.allclose(torch.zeros(F).double() if offset is None else offset, at_zero)
    assert step.uniform


def test_a_linear_layer_of_some_columns() -> None:
    module = drawn(nn.Linear(D, F))
    some, rest = Linear(module, slice(0, 2)), Linear(module, slice(2, None))
    x = rows()
    added = x[..., :2] @ some.weight.T + x[..., 2:] @ rest.weight.T + module.bias
    assert torch.allclose(added, module(x))


def test_the_weight_is_read_anew_each_time() -> None:
    module = drawn(nn.Linear(D, F))
    step, x = Linear(module), rows()
    kept, before = step.read(), step(x)
    with torch.no_grad():
        module.weight.mul_(2.0)
    assert torch.equal(step(x), module(x))
    assert torch.equal(kept(x), before) or torch.equal(kept(x), module(x))


@pytest.mark.parametrize("kind", [Scale, LayerScale])
def test_scale(kind: type[Scale]) -> None:
    gamma = nn.Parameter(rows(D))
    check(kind(gamma), lambda x: x * gamma.detach(), rows())
    check(kind(0.3), lambda x: x * 0.3, rows())
    assert kind(gamma).offset() is None
    assert not kind(gamma)(rows()).requires_grad


def test_gate() -> None:
    gate = rows()
    check(Gate(gate), lambda x: x * gate, rows())
    assert not Gate(gate).uniform


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norm(name: str, scale: float) -> None:
    module: Any = NORMS[name]()
    x = scale * rows()
    step = Norm(module)
    check(step, module, x)
    beta = getattr(module, "bias", None)
    offset = step.offset()
    assert (offset is None) == (beta is None)
    if beta is not None:
        assert torch.equal(offset, beta)
    assert not step.uniform


@pytest.mark.parametrize("name", NORMS)
def test_norm_in_half_precision_is_computed_in_float32(name: str) -> None:
    module: Any = NORMS[name]().bfloat16()
    x = rows().bfloat16()
    step = Norm(module)
    assert step(x).dtype == torch.float32
    exact = step(x.double())
    assert torch.allclose(step(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_norm_of_each_head() -> None:
    module = drawn(nn.LayerNorm(D // 2))
    step = Norm(module, groups=2)
    check(step, lambda x: module(x.unflatten(-1, (2, -1))).flatten(-2), rows())
    assert torch.equal(step.offset(), module.bias.repeat(2))


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_linear_layers_side_by_side(biases: tuple[bool, bool]) -> None:
    one, two = (
        drawn(nn.Linear(D, width, bias=bias)) for width, bias in zip((F, 5), biases, strict=True)
    )
    check(SideBySide((one, two)), lambda x: torch.cat([one(x), two(x)], -1), rows())


class Swish(nn.Module):
    """An activation of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 * x).sigmoid()


class GELU(nn.Module):
    """A user's module under a name that torch has, too."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU(approximate="tanh"),
    "GELU by tanh, of timm": GELUTanh(),
    "QuickGELU of timm": QuickGELU(),
    "SiLU": nn.SiLU(),
    "ReLU": nn.ReLU(),
    "Mish": nn.Mish(),
    "one of the user's": Swish(),
    "the user's under torch's name": GELU(),
    "a function": torch.tanh,
    **{f"{name} of transformers": ACT2FN[name] for name in ("gelu", "gelu_new", "quick_gelu")},
    **{
        f"{name} of transformers": ACT2FN[name]
        for name in ("gelu_pytorch_tanh", "gelu_python", "gelu_10", "silu", "relu", "tanh")
    },
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    """The slope of every activation is autograd's, whichever way it is found."""
    step, x = Activation(ACTIVATIONS[name]), 3.0 * rows()
    check(step, ACTIVATIONS[name], x)
    assert not step.uniform and step.offset() is None
    with torch.no_grad():
        assert not step.slope(x).requires_grad


def test_an_activation_with_a_forward_of_its_own() -> None:
    """What the module computes counts, not what its class is known for."""
    function = nn.ReLU()
    function.forward = torch.sin  # type: ignore[method-assign]
    check(Activation(function), torch.sin, rows())


def test_hooks_of_an_activation_are_not_called() -> None:
    """They are for what the model computes, and would hear of rows that it never made."""
    function = nn.Mish()
    heard: list[Tensor] = []
    function.register_forward_hook(lambda *call: heard.append(call[-1]))
    step, x = Activation(function), rows()
    step(x), step.slope(x)
    assert not heard


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("name", ["GELU", "SiLU", "one of the user's"])
def test_gated_activation(name: str, gate_last: bool) -> None:
    act = ACTIVATIONS[name]

    def gated(x: Tensor) -> Tensor:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return a * act(b) if gate_last else act(a) * b

    step = GatedActivation(act, gate_last)
    check(step, gated, 2.0 * rows())
    assert not step.uniform


@pytest.mark.parametrize("name", NORMS)
def test_frozen_norm_is_affine(name: str) -> None:
    module: Any = NORMS[name]()
    step, x = Norm(module), rows()
    offset = step.offset()
    offset = torch.zeros(D).double() if offset is None else offset
    frozen = step.at(x, frozen=True)
    through = frozen.jvp(x[..., None, :])[..., 0, :] + offset
    assert torch.allclose(through, module(x), rtol=1e-10, atol=1e-10)
    c, t = rows(B, Q, K, D), rows(B, Q, K, D)
    one, other = (frozen.jvp(t) * c).sum(), (frozen.vjp(c) * t).sum()
    assert torch.isclose(one, other, rtol=1e-10)


@pytest.mark.parametrize("name", NORMS)
def test_one_tangent_for_all_rows(name: str) -> None:
    """The mean of all rows' tangents, in two halves, the second of which folds into a weight."""
    step, x, tangent = Norm(NORMS[name]()), rows(), rows(B, 5, D)
    weight = rows(6, D)
    same = tangent[:, None].expand(B, Q, 5, D)
    expected = step.at(x).jvp(same).mean(1)
    moved = step.jvp_mean(x, tangent)
    assert torch.allclose(step.constant(moved), expected, rtol=1e-10, atol=1e-12)
    read = moved @ step.fold(weight).T
    assert torch.allclose(read, expected @ weight.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lead", [(B,), (4, B)])
@pytest.mark.parametrize("name", NORMS)
def test_one_cotangent_for_all_rows(name: str, lead: tuple[int, ...]) -> None:
    step, x, c = Norm(NORMS[name]()), rows(*lead, Q, D), rows(*lead, 1, K, D)
    expected = step.at(x).vjp(c.expand(*lead, Q, K, D)).sum(-3, keepdim=True)
    assert torch.allclose(step.vjp_sum(x, c), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("module", [nn.BatchNorm1d(D), nn.GroupNorm(2, D), nn.Tanh()])
def test_other_norms_are_refused(module: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{type(module).__name__} is no norm"):
        Norm(module)


def test_a_norm_over_channels_first_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LayerNorm2d is no norm"):
        Norm(LayerNorm2d(D))
