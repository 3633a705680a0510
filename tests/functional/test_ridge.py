"""Ridge probes from sums: by hand, against a dense solve of the rows, and against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_classemb.functional.ridge import packed_gram, packed_size, ridge, unpack_gram

CLASSES = 4


def rows(count: int = 60, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64) + 2.0
    return x, torch.randint(0, CLASSES, (count,), generator=generator)


def sums(x: Tensor, y: Tensor, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.nn.functional.one_hot(y, classes).to(x.dtype)
    return x.T @ x, chosen.T @ x, chosen.sum(0)


def test_by_hand() -> None:
    """x = 0 of class 0, x = 2 of class 1: centred −1 and 1, slope Σxy / (Σx² + α) = ∓2/(2 + 2)."""
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    weight, bias = ridge(*sums(x, torch.tensor([0, 1]), 2), alpha=2.0)
    assert weight.flatten().tolist() == [-0.5, 0.5]
    assert bias.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0])
def test_against_a_dense_solve_of_the_rows(alpha: float) -> None:
    """The intercept is a column of ones whose weight costs nothing."""
    x, y = rows()
    targets = 2.0 * torch.nn.functional.one_hot(y, CLASSES).double() - 1.0
    padded = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    penalty = alpha * torch.eye(8, dtype=x.dtype)
    penalty[-1, -1] = 0.0
    expected = torch.linalg.solve(padded.T @ padded + penalty, padded.T @ targets)
    weight, bias = ridge(*sums(x, y), alpha)
    torch.testing.assert_close(weight, expected[:-1].T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bias, expected[-1], rtol=1e-10, atol=1e-12)


def test_against_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = rows()
    targets = 2.0 * torch.nn.functional.one_hot(y, CLASSES).double() - 1.0
    fitted = linear_model.Ridge(alpha=1.0).fit(x.numpy(), targets.numpy())
    weight, bias = ridge(*sums(x, y), 1.0)
    torch.testing.assert_close(weight, torch.from_numpy(fitted.coef_), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias, torch.from_numpy(fitted.intercept_), rtol=1e-9, atol=1e-12)


def test_without_a_penalty_dependent_features_share_the_weight() -> None:
    x, y = rows(width=1)
    twice = torch.cat([x, x], 1)
    weight, _ = ridge(*sums(twice, y), alpha=0.0)
    alone, _ = ridge(*sums(x, y), alpha=0.0)
    torch.testing.assert_close(weight, alone.expand(-1, 2) / 2, rtol=1e-6, atol=1e-9)


def test_a_class_without_rows_is_constant() -> None:
    x, y = rows()
    more = ridge(*sums(x, y, CLASSES + 1))
    weight, bias = ridge(*sums(x, y))
    torch.testing.assert_close(more[0][:-1], weight)
    torch.testing.assert_close(more[1][:-1], bias)
    assert more[0][-1].abs().max() < 1e-12 and more[1][-1] == pytest.approx(-1.0)


@pytest.mark.parametrize("width", [5, 128, 200, 300])
def test_packed_gram(width: int) -> None:
    x, _ = rows(20, width)
    packed = packed_gram(x.float())
    assert packed.dtype == torch.float64 and packed.numel() == packed_size(width) <= width**2
    exact = x.float().double()
    torch.testing.assert_close(unpack_gram(packed, width), exact.T @ exact, rtol=1e-12, atol=1e-12)
    parts = packed_gram(x[:7].float()) + packed_gram(x[7:].float())
    torch.testing.assert_close(parts, packed, rtol=1e-12, atol=1e-12)
