"""The class embedding, for every order of norm, mean and head, against torch's own modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import frozen_at
from torch import Tensor, nn

from captum_classemb.readout import ClassEmbedding, Linear, Norm, Part

B, N, D, C, K = 2, 6, 8, 5, 3
CLS = slice(0, 1)


def drawn(module: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise)
    return module


def norm(seed: int, rms: bool = False) -> Any:
    return drawn(nn.RMSNorm(D, eps=1e-4) if rms else nn.LayerNorm(D), seed)


def head(seed: int, width: int = D, bias: bool = True) -> Any:
    return drawn(nn.Linear(width, C, bias=bias), seed)


@dataclass
class Case:
    """A readout, and the same map written with torch's modules; ``alone`` reads one token."""

    readout: ClassEmbedding
    whole: Callable[[Tensor], Tensor]
    alone: Callable[[Tensor, int], Tensor]


def one_head(tokens: slice, before: Any = None, after: Any = None, bias: bool = True) -> Case:
    linear = head(1, bias=bias)
    same = nn.Identity()
    first, second = before or same, after or same
    readout = ClassEmbedding(
        [Part(Linear(linear), tokens)],
        None if before is None else Norm(before),
        None if after is None else Norm(after),
        C,
    )
    return Case(
        readout,
        lambda x: linear(second(first(x[:, tokens]).mean(1))),
        lambda x, n: linear(second(first(x[:, n]))),
    )


def distilled() -> Case:
    one, two, last = head(1), head(2), norm(3)
    readout = ClassEmbedding(
        [Part(Linear(one), CLS, 0.5), Part(Linear(two), slice(1, 2), 0.5)], Norm(last), None, C
    )

    def alone(x: Tensor, n: int) -> Tensor:
        y = last(x[:, n])
        z: Tensor = [one(y), two(y)][n] if n < 2 else (one(y) + two(y)) / 2
        return z

    return Case(readout, lambda x: (one(last(x[:, 0])) + two(last(x[:, 1]))) / 2, alone)


def split_columns() -> Case:
    """One classifier over CLS beside the mean patch: each token is read by its own columns."""
    linear, last = head(1, 2 * D), norm(3)
    readout = ClassEmbedding(
        [
            Part(Linear(linear, slice(0, D)), CLS),
            Part(Linear(linear, slice(D, 2 * D)), slice(1, None)),
        ],
        Norm(last),
        None,
        C,
    )

    def alone(x: Tensor, n: int) -> Tensor:
        columns = slice(0, D) if n == 0 else slice(D, 2 * D)
        z: Tensor = last(x[:, n]) @ linear.weight[:, columns].T + linear.bias
        return z

    def whole(x: Tensor) -> Tensor:
        y = last(x)
        z: Tensor = linear(torch.cat([y[:, 0], y[:, 1:].mean(1)], -1))
        return z

    return Case(readout, whole, alone)


CASES: dict[str, Callable[[], Case]] = {
    "norm, token": lambda: one_head(CLS, norm(3)),
    "token, norm": lambda: one_head(CLS, None, norm(4)),
    "token, both norms": lambda: one_head(CLS, norm(3), norm(4)),
    "token, no norm": lambda: one_head(CLS),
    "token, no bias": lambda: one_head(CLS, norm(3), bias=False),
    "a token in between": lambda: one_head(slice(2, 3), norm(3)),
    "norm, mean": lambda: one_head(slice(1, None), norm(3)),
    "mean, norm": lambda: one_head(slice(1, None), None, norm(4)),
    "norm, mean, norm": lambda: one_head(slice(2, None), norm(3), norm(4)),
    "mean, no norm": lambda: one_head(slice(0, None)),
    "rms, mean": lambda: one_head(slice(1, None), norm(3, rms=True)),
    "mean, rms": lambda: one_head(slice(1, None), None, norm(4, rms=True)),
    "distilled": distilled,
    "split columns": split_columns,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def tokens(seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, D, generator=generator, dtype=torch.float64)


TARGET = torch.tensor([4, 1])


def test_it_is_the_models_own_readout(case: Case) -> None:
    x = tokens()
    logits = case.readout(x[:, case.readout.reads])
    assert torch.allclose(logits, case.whole(x), rtol=1e-11)


def test_the_rows_it_reads_are_all_that_count(case: Case) -> None:
    x = tokens().requires_grad_(True)
    (gradient,) = torch.autograd.grad(case.whole(x).sum(), x)
    outside = torch.ones(N, dtype=torch.bool)
    outside[case.readout.reads] = False
    assert not gradient[:, outside].any()
    assert gradient[:, ~outside].any(-1).all()


def test_projection_reads_every_token_alone(case: Case) -> None:
    x = tokens()
    projected = case.readout.project(x)
    assert projected.shape == (B, N, C)
    for n in range(N):
        assert torch.allclose(projected[:, n], case.alone(x, n), rtol=1e-11)
    picked = projected.gather(-1, TARGET[:, None, None].expand(B, N, 1))[..., 0]
    assert torch.allclose(case.readout.project(x, TARGET), picked, rtol=1e-11)


def by_autograd(case: Case, x: Tensor, g: Tensor) -> Tensor:
    """∂(g·logits)/∂tokens for K weightings of each image, B×K×C: B×N×K×D."""
    found = []
    for weights in g.unbind(-2):
        leaf = x.clone().requires_grad_(True)
        found.append(torch.autograd.grad((case.whole(leaf) * weights).sum(), leaf)[0])
    return torch.stack(found, 2)


def test_vjp_is_the_gradient(case: Case) -> None:
    x, g = tokens(), torch.randn(B, K, C, dtype=torch.float64)
    rows = x[:, case.readout.reads]
    expected = by_autograd(case, x, g)[:, case.readout.reads]
    assert torch.allclose(case.readout.vjp(rows, g), expected, rtol=1e-10)
    summed = case.readout.vjp(rows, g, summed=True)
    assert torch.allclose(summed, expected.sum(1, keepdim=True), rtol=1e-10, atol=1e-13)


def test_blocks_are_a_dimension_in_front(case: Case) -> None:
    """Rows L×B×Q×D are read and followed back as block by block."""
    blocks, g = torch.stack([tokens(7), tokens(8)]), torch.randn(2, B, K, C, dtype=torch.float64)
    rows, readout = blocks[:, :, case.readout.reads], case.readout
    close = {"rtol": 1e-11, "atol": 1e-12}
    assert torch.allclose(readout(rows), torch.stack([readout(x) for x in rows]), **close)
    for options in ({}, {"frozen": True}, {"summed": True}):
        alone = [readout.vjp(x, one, **options) for x, one in zip(rows, g, strict=True)]
        assert torch.allclose(readout.vjp(rows, g, **options), torch.stack(alone), **close)


def test_with_frozen_norms_it_is_affine(case: Case) -> None:
    x, g = tokens()[:, case.readout.reads], torch.randn(B, K, C, dtype=torch.float64)
    u = case.readout.vjp(x, g, frozen=True)
    bias, pool = case.readout.constants(x, g)
    split = (u * x[:, :, None]).sum((1, 3)) + bias
    assert pool is None and bias.shape == (B, K)
    expected = (case.readout(x)[:, None] * g).sum(-1)
    assert torch.allclose(split, expected, rtol=1e-10, atol=1e-12)
    summed = case.readout.vjp(x, g, frozen=True, summed=True)
    if case.readout.token_norm is None:  # rows that differ have no sum with σ frozen otherwise
        assert torch.allclose(summed, u.sum(1, keepdim=True), rtol=1e-10, atol=1e-13)


def test_the_constants_are_what_the_biases_make() -> None:
    """With every bias 0 nothing is left; with only the head's bias, it is that bias."""
    linear, before, after = head(1), norm(3), norm(4)
    for bias in (before.bias, after.bias):
        nn.init.zeros_(bias)
    readout = ClassEmbedding([Part(Linear(linear), slice(1, None))], Norm(before), Norm(after), C)
    g = torch.randn(B, K, C, dtype=torch.float64)
    rows = tokens()[:, 1:]
    assert torch.allclose(readout.constants(rows, g)[0], g @ linear.bias, rtol=1e-12)
    nn.init.zeros_(linear.bias)
    assert torch.equal(readout.constants(rows, g)[0], torch.zeros(B, K, dtype=torch.float64))


def test_token_directions(case: Case) -> None:
    """u·x of a token is what its logit loses when the token becomes 0 and every σ stays."""
    x = tokens()
    u = case.readout.token_directions(x, TARGET)
    assert u.shape == (B, N, D)
    steps = (case.readout.token_norm, case.readout.pooled_norm)
    for n in range(N):
        entering, handles = x[:, n], []
        for module in (step.module for step in steps if step is not None):
            entered, entering = entering, module(entering)
            handles.append(module.register_forward_hook(frozen_at(entered)))
        lost = case.alone(x, n) - case.alone(torch.zeros_like(x), n)
        for handle in handles:
            handle.remove()
        expected = lost.gather(1, TARGET[:, None])[:, 0]
        assert torch.allclose((u * x).sum(-1)[:, n], expected, rtol=1e-9, atol=1e-10)


def test_one_tangent_for_all_rows(case: Case) -> None:
    """All classes: features moved by a tangent, then read, are the derivative of the logits."""
    x = tokens()[:, case.readout.reads]
    t = torch.randn(B, 3, D, dtype=torch.float64)
    moved = case.readout.jvp_features(x, t) @ case.readout.head_weight().T
    for n in range(3):
        same = t[:, n : n + 1].expand_as(x)
        _, expected = torch.autograd.functional.jvp(case.readout, x, same)
        assert torch.allclose(moved[:, n], expected, rtol=1e-9, atol=1e-10)
    some = torch.tensor([3, 0])
    assert torch.equal(case.readout.head_weight(some), case.readout.head_weight()[some])


def test_frozen_tangents_of_single_rows(case: Case) -> None:
    """Weighted sums of row tangents, read with σ frozen, are u·tangent for all classes at once."""
    readout, x = case.readout, tokens()[:, case.readout.reads]
    t = torch.randn(B, x.shape[1], 3, D, dtype=torch.float64)  # one for each row and source
    weighted = torch.einsum("bpq,bqnd->bpnd", readout.frozen_shares(x), t)
    maps = readout.frozen_features(x, weighted) @ readout.head_weight().T
    every = torch.eye(C, dtype=torch.float64).expand(B, C, C)
    u = readout.vjp(x, every, frozen=True)
    assert torch.allclose(maps, torch.einsum("bqcd,bqnd->bnc", u, t), rtol=1e-9, atol=1e-12)


def test_half_precision_is_read_in_float32(case: Case) -> None:
    readout = case.readout
    steps = [readout.token_norm, readout.pooled_norm, *(part.head for part in readout.parts)]
    modules = [step.module for step in steps if step is not None]
    x = tokens().bfloat16()
    for module in modules:
        module.bfloat16()
    logits = readout.project(x)
    assert logits.dtype == torch.float32
    for module in modules:
        module.double()
    assert torch.allclose(logits.double(), readout.project(x.double()), rtol=1e-4, atol=1e-4)
