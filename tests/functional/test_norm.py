"""Norms: values and derivatives by hand, by autograd, and against torch's and timm's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.fast_norm import simple_norm
from torch import Tensor
from torch.nn import functional as F

from captum_classemb.functional.norm import NormJacobian, NormKind, normalise

KINDS = get_args(NormKind)
WIDTH, K = 6, 2
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


def jacobian(
    x: Tensor, kind: NormKind, gamma: Tensor | None = None, frozen: bool = False, eps: float = EPS
) -> NormJacobian:
    return NormJacobian.at(normalise(x, eps, kind), gamma, kind, frozen)


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
    x, e0 = torch.tensor([[1.0, 3.0]]), torch.tensor([[[1.0, 0.0]]])
    assert torch.allclose(jacobian(x, "layer", eps=0.0).vjp(e0), torch.zeros(2))
    # With σ = 1 frozen only the mean is taken off.
    frozen = jacobian(x, "layer", None, True, eps=0.0)
    assert torch.allclose(frozen.vjp(e0), torch.tensor([0.5, -0.5]))
    frozen = jacobian(x, "layer", torch.tensor([3.0, 1.0]), True, eps=0.0)
    assert torch.allclose(frozen.vjp(e0), torch.tensor([1.5, -1.5]))
    assert torch.allclose(frozen.jvp(e0), torch.tensor([1.5, -0.5]))


def test_jacobian_of_rms_norm_by_hand() -> None:
    x, e0 = torch.tensor([[1.0, 1.0]]), torch.tensor([[[1.0, 0.0]]])  # σ = 1, x̂ = (1, 1)
    assert torch.allclose(jacobian(x, "rms", eps=0.0).vjp(e0), torch.tensor([0.5, -0.5]))
    assert torch.allclose(jacobian(x, "rms", None, True, eps=0.0).vjp(e0), e0)


def each(function: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor, way: str) -> Tensor:
    """The derivative by autograd, for K vectors of each row one by one: Q×K×D."""
    by_autograd = getattr(torch.autograd.functional, way)
    return torch.stack([by_autograd(function, x, v)[1] for v in vectors.unbind(1)], 1)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives(kind: NormKind, scaled: bool) -> None:
    gamma = random(WIDTH, seed=1) if scaled else None
    x, c, t = random(3, WIDTH), random(3, K, WIDTH, seed=2), random(3, K, WIDTH, seed=3)
    state = normalise(x, EPS, kind)
    y = state.x_hat if gamma is None else state.x_hat * gamma
    norm = reference(kind, gamma)
    assert torch.allclose(y, norm(x), rtol=1e-12, atol=1e-12)
    of_norm = jacobian(x, kind, gamma)
    vjp, jvp = each(norm, x, c, "vjp"), each(norm, x, t, "jvp")
    assert torch.allclose(of_norm.vjp(c), vjp, rtol=1e-11, atol=1e-12)
    assert torch.allclose(of_norm.jvp(t), jvp, rtol=1e-11, atol=1e-12)
    scale, into, back = of_norm.factors()
    assert torch.allclose(c * scale - (c @ into) @ back / WIDTH, vjp, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_norm_is_the_affine_map_at_a_fixed_sigma(kind: NormKind) -> None:
    gamma, x = random(WIDTH, seed=1), random(3, WIDTH)
    centre = x.mean(-1, keepdim=True) if kind != "rms" else 0.0
    bessel = WIDTH - 1 if kind == "simple" else WIDTH
    sigma = (((x - centre) ** 2).sum(-1, keepdim=True) / bessel + EPS).sqrt()

    def affine(z: Tensor) -> Tensor:
        z = z - z.mean(-1, keepdim=True) if kind == "layer" else z
        return z / sigma * gamma

    frozen = jacobian(x, kind, gamma, frozen=True)
    c, t = random(3, K, WIDTH, seed=2), random(3, K, WIDTH, seed=3)
    vjp = each(affine, x, c, "vjp")
    jvp = torch.stack([affine(one) for one in t.unbind(1)], 1)
    assert torch.allclose(frozen.vjp(c), vjp, rtol=1e-12, atol=1e-13)
    assert torch.allclose(frozen.jvp(t), jvp, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_one_of_several_blocks(kind: NormKind, frozen: bool) -> None:
    """The Jacobian of rows L×Q×D with a γ for each block, one block taken out."""
    x, gamma, c = random(4, 3, WIDTH), random(4, 1, WIDTH, seed=1), random(3, K, WIDTH, seed=2)
    whole = jacobian(x, kind, gamma, frozen)
    for block in range(4):
        alone = jacobian(x[block], kind, gamma[block, 0], frozen)
        assert torch.equal(whole[block].vjp(c), alone.vjp(c))
        assert torch.equal(whole[block].jvp(c), alone.jvp(c))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    frozen=st.booleans(),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 100.0]),
)
def test_jvp_is_the_transpose_of_vjp(
    kind: NormKind, frozen: bool, seed: int, scale: float, shift: float
) -> None:
    x, c, t = random(3, 1, 1, WIDTH, seed=seed).unbind(0)
    gamma = random(WIDTH, seed=seed + 1)
    of_norm = jacobian(x[0] * scale + shift, kind, gamma, frozen)
    pushed = of_norm.jvp(t)
    one, other = (pushed * c).sum(), (t * of_norm.vjp(c)).sum()
    assert abs(one - other) <= 1e-9 * float(pushed.norm() * c.norm()) + 1e-12
