"""Norms: values and derivatives by hand, by autograd, and against torch's and timm's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.fast_norm import simple_norm
from torch import Tensor
from torch.nn import functional as F

from captum_classemb.functional.norm import NormKind, normalise, pull, pull_rows, push

KINDS = get_args(NormKind)
WIDTH = 6
EPS = 1e-3


def reference(kind: NormKind, gamma: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The norm as torch and timm compute it."""
    if kind == "layer":
        return lambda x: F.layer_norm(x, (WIDTH,), gamma, None, EPS)
    if kind == "rms":
        return lambda x: F.rms_norm(x, (WIDTH,), gamma, EPS)
    return lambda x: simple_norm(x, [WIDTH], gamma, EPS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_layer_norm_by_hand() -> None:
    state = normalise(torch.tensor([1.0, 3.0, 5.0]), eps=0.0, kind="layer")
    root = 1.5**0.5  # mean 3, variance 8/3
    assert torch.allclose(state.x_hat, torch.tensor([-root, 0.0, root]))
    assert torch.allclose(1 / state.inverse_sigma, torch.tensor([(8 / 3) ** 0.5]))


def test_rms_norm_by_hand() -> None:
    state = normalise(torch.tensor([3.0, 4.0]), eps=0.0, kind="rms")
    assert torch.allclose(state.x_hat, torch.tensor([3.0, 4.0]) / 12.5**0.5)


def test_simple_norm_by_hand() -> None:
    # torch.var of (0, 2) is 2, with D − 1 = 1 below; the mean is not taken off.
    state = normalise(torch.tensor([0.0, 2.0]), eps=0.0, kind="simple")
    assert torch.allclose(state.x_hat, torch.tensor([0.0, 2.0**0.5]))


def test_jacobian_of_layer_norm_by_hand() -> None:
    # Two numbers are normalised to −1 and 1 wherever they are: the derivative is 0.
    state = normalise(torch.tensor([1.0, 3.0]), eps=0.0, kind="layer")
    e0 = torch.tensor([1.0, 0.0])
    assert torch.allclose(pull(e0, state, None, "layer", False), torch.zeros(2))
    # With σ = 1 held only the mean is taken off.
    assert torch.allclose(pull(e0, state, None, "layer", True), torch.tensor([0.5, -0.5]))
    gamma = torch.tensor([3.0, 1.0])
    assert torch.allclose(pull(e0, state, gamma, "layer", True), torch.tensor([1.5, -1.5]))
    assert torch.allclose(push(e0, state, gamma, "layer", True), torch.tensor([1.5, -0.5]))


def test_jacobian_of_rms_norm_by_hand() -> None:
    state = normalise(torch.tensor([1.0, 1.0]), eps=0.0, kind="rms")  # σ = 1, x̂ = (1, 1)
    e0 = torch.tensor([1.0, 0.0])
    assert torch.allclose(pull(e0, state, None, "rms", False), torch.tensor([0.5, -0.5]))
    assert torch.allclose(pull(e0, state, None, "rms", True), e0)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives(kind: NormKind, scaled: bool) -> None:
    gamma = random(WIDTH, seed=1) if scaled else None
    x, c, t = random(3, WIDTH), random(3, WIDTH, seed=2), random(3, WIDTH, seed=3)
    state = normalise(x, EPS, kind)
    y = state.x_hat if gamma is None else state.x_hat * gamma
    norm = reference(kind, gamma)
    assert torch.allclose(y, norm(x), rtol=1e-12, atol=1e-12)
    _, vjp = torch.autograd.functional.vjp(norm, x, c)
    _, jvp = torch.autograd.functional.jvp(norm, x, t)
    assert torch.allclose(pull(c, state, gamma, kind, False), vjp, rtol=1e-11, atol=1e-12)
    summed = vjp.sum(0, keepdim=True)
    assert torch.allclose(pull_rows(c, state, gamma, kind), summed, rtol=1e-11, atol=1e-12)
    assert torch.allclose(push(t, state, gamma, kind, False), jvp, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_held_norm_is_the_affine_map_at_a_fixed_sigma(kind: NormKind) -> None:
    gamma, x = random(WIDTH, seed=1), random(3, WIDTH)
    centre = x.mean(-1, keepdim=True) if kind != "rms" else 0.0
    bessel = WIDTH - 1 if kind == "simple" else WIDTH
    sigma = (((x - centre) ** 2).sum(-1, keepdim=True) / bessel + EPS).sqrt()

    def held(z: Tensor) -> Tensor:
        z = z - z.mean(-1, keepdim=True) if kind == "layer" else z
        return z / sigma * gamma

    state = normalise(x, EPS, kind)
    c, t = random(3, WIDTH, seed=2), random(3, WIDTH, seed=3)
    _, vjp = torch.autograd.functional.vjp(held, x, c)
    assert torch.allclose(pull(c, state, gamma, kind, True), vjp, rtol=1e-12, atol=1e-13)
    assert torch.allclose(push(t, state, gamma, kind, True), held(t), rtol=1e-12, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    hold=st.booleans(),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 100.0]),
)
def test_push_is_the_transpose_of_pull(
    kind: NormKind, hold: bool, seed: int, scale: float, shift: float
) -> None:
    x, c, t = random(3, WIDTH, seed=seed).unbind(0)
    gamma = random(WIDTH, seed=seed + 1)
    state = normalise(x * scale + shift, EPS, kind)
    one = push(t, state, gamma, kind, hold) @ c
    other = t @ pull(c, state, gamma, kind, hold)
    size: Any = push(t, state, gamma, kind, hold).norm() * c.norm()
    assert abs(one - other) <= 1e-9 * size + 1e-12
