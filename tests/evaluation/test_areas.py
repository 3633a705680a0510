"""Areas under removal curves: closed forms by hand, brute force, and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.evaluation.areas import area, paper_area, removal_counts, trapezoid_area

share = st.floats(0, 1, allow_nan=False, width=32)


@pytest.mark.parametrize("tokens", [2, 49, 196])
def test_a_flat_curve_scores_one_in_one_convention_and_just_below_in_the_other(tokens: int) -> None:
    removed = torch.arange(tokens + 1)
    flat = torch.full((tokens + 1,), 0.7)
    assert paper_area(removed, flat, tokens).item() == pytest.approx((tokens - 1) / tokens)
    assert trapezoid_area(removed, flat).item() == pytest.approx(0.7)


@given(st.lists(share, min_size=3, max_size=40))
def test_paper_area_is_the_published_sum(values: list[float]) -> None:
    tokens = len(values) - 1
    published = np.asarray(values[1:-1])
    expected = published.sum() / (tokens * published.max()) if published.max() > 0 else 0.0
    found = paper_area(torch.arange(tokens + 1), torch.tensor(values), tokens)
    assert found.item() == pytest.approx(expected, abs=1e-9)


@given(st.integers(2, 60), st.data())
def test_points_in_between_are_filled_in_linearly(tokens: int, data: st.DataObject) -> None:
    points = data.draw(st.integers(2, tokens + 1))
    removed = removal_counts(tokens, points)
    curve = torch.tensor(data.draw(st.lists(share, min_size=points, max_size=points)))
    dense = np.interp(np.arange(tokens + 1), removed.numpy(), curve.double().numpy())
    every = torch.arange(tokens + 1)
    for convention in ("paper", "trapezoid"):
        sparse = area(removed, curve, tokens, convention)
        full = area(every, torch.from_numpy(dense), tokens, convention)
        assert sparse.item() == pytest.approx(full.item(), abs=1e-9)


@given(st.integers(1, 300), st.data())
def test_removal_counts_run_from_none_to_all_in_even_steps(n: int, data: st.DataObject) -> None:
    points = data.draw(st.integers(2, n + 1))
    counts = removal_counts(n, points)
    assert counts[0] == 0 and counts[-1] == n and len(counts) == points
    steps = counts.diff()
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1


def test_a_higher_curve_has_a_larger_trapezoid_area() -> None:
    removed = removal_counts(10, 3)
    high, low = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.1, 0.0]])
    areas = trapezoid_area(removed, torch.stack([high, low]))
    assert areas.tolist() == pytest.approx([0.7, 0.3])


def test_refusals_say_what_is_wrong() -> None:
    removed, curve = torch.tensor([0, 5, 10]), torch.tensor([1.0, 0.5, 0.1])
    with pytest.raises(InputError, match="between 2 and 11"):
        removal_counts(10, 12)
    with pytest.raises(InputError, match="ascend"):
        trapezoid_area(torch.tensor([1, 5, 10]), curve)
    with pytest.raises(InputError, match="ascend"):
        trapezoid_area(torch.tensor([0, 5, 5]), curve)
    with pytest.raises(InputError, match="does not fit"):
        trapezoid_area(removed, curve[:2])
    with pytest.raises(InputError, match="up to 11 of 12"):
        paper_area(removed, curve, tokens=12)
    with pytest.raises(InputError, match="below 0"):
        paper_area(removed, -curve, tokens=10)
    with pytest.raises(NonFiniteError):
        trapezoid_area(removed, curve.log() * torch.inf)
    with pytest.raises(InputError, match="'paper' or 'trapezoid'"):
        area(removed, curve, 10, "simpson")  # type: ignore[arg-type]
