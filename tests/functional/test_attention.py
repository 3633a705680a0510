"""What attention brings along a direction: by hand, and by loops over heads and tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classemb.functional.attention import attention_weights, carried, values_along

B, H, Q, N, D = 2, 3, 4, 5, 6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_weights_by_hand() -> None:
    query = torch.tensor([2.0]).view(1, 1, 1, 1)
    key = torch.tensor([0.0, math.log(3.0)]).view(1, 1, 2, 1)
    assert torch.allclose(attention_weights(query, key, 0.5), torch.tensor([0.25, 0.75]))
    bias = torch.tensor([math.log(3.0), 0.0])
    assert torch.allclose(attention_weights(query, key, 0.5, bias), torch.tensor([0.5, 0.5]))
    hidden = torch.tensor([0.0, -math.inf])
    assert attention_weights(query, key, 0.5, hidden).flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("rows", [1, Q])
@pytest.mark.parametrize("biased", [True, False])
def test_weights_are_those_of_fused_attention(rows: int, biased: bool) -> None:
    query, key = random(B, H, rows, D), random(B, H, N, D)
    bias = random(1, H, rows, N) if biased else None
    shown = torch.eye(N, dtype=torch.float64).expand(B, H, N, N)
    fused = F.scaled_dot_product_attention(query, key, shown, attn_mask=bias, scale=0.3)
    assert torch.allclose(attention_weights(query, key, 0.3, bias), fused, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, Q])
def test_half_precision_weights_are_computed_in_float32(rows: int) -> None:
    query, key = random(B, H, rows, D).bfloat16(), random(B, H, N, D).bfloat16()
    weights = attention_weights(query, key, 0.3)
    assert weights.dtype == torch.float32
    expected = attention_weights(query.double(), key.double(), 0.3)
    assert torch.allclose(weights.double(), expected, rtol=1e-5)


def beside(heads: Tensor) -> Tensor:
    """…×Q×K×(H·d), the heads of B×H×Q×K×d side by side."""
    return heads.permute(0, 2, 3, 1, 4).flatten(3)


def test_values_along_a_direction_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0], [0.0, -1.0]]).view(1, 1, 2, 2)
    direction = torch.tensor([3.0, 1.0]).view(1, 1, 1, 2)
    assert values_along(values, direction).flatten().tolist() == [5.0, -1.0]


def test_values_along_a_direction_are_the_derivative_of_the_mix() -> None:
    values, directions = random(B, H, N, D), random(B, H, Q, 1, D)
    weights = random(B, H, Q, N).requires_grad_(True)
    score = ((weights @ values) * directions[..., 0, :]).sum()
    (by_autograd,) = torch.autograd.grad(score, weights)
    closed = values_along(values, beside(directions))
    assert torch.allclose(closed[..., 0, :], by_autograd, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, Q])
@pytest.mark.parametrize("several", [1, 3])
def test_what_is_carried_by_loops(rows: int, several: int) -> None:
    values, weights = random(B, H, N, D), random(B, H, rows, N)
    directions = random(B, H, rows, several, D)
    entries = carried(weights, values, beside(directions))
    assert entries.shape == (B, H, several, N)
    for b, e, k, j in itertools.product(range(B), range(several), range(H), range(N)):
        looped = sum(
            weights[b, k, q, j] * (values[b, k, j] @ directions[b, k, q, e]) for q in range(rows)
        )
        assert torch.isclose(entries[b, k, e, j], torch.as_tensor(looped), rtol=1e-11)
    total = ((weights @ values)[:, :, :, None] * directions).sum((2, 4))
    assert torch.allclose(entries.sum(-1), total, rtol=1e-11)


def test_blocks_are_a_dimension_in_front() -> None:
    values, weights = random(2, B, H, N, D), random(2, B, H, Q, N)
    directions = random(2, B, Q, 3, H * D)
    blocks = [carried(*block) for block in zip(weights, values, directions, strict=True)]
    assert torch.allclose(carried(weights, values, directions), torch.stack(blocks), rtol=1e-12)
