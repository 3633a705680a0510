"""Orders of patches and what is measured of logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.evaluation.removal_order import outcomes, patch_sums, removal_order
from captum_classemb.functional.grid import spread


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_patch_sums_undo_the_spreading(h: int, w: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, h, w, generator=generator, dtype=torch.float64)
    pixels = spread(patches, (h * size, w * size), 3)
    assert torch.allclose(patch_sums(pixels, (h, w)), patches)


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0, 3.5]), min_size=1, max_size=30))
def test_the_order_ascends_and_names_every_patch_once(scores: list[float]) -> None:
    maps = torch.tensor(scores)[None, None]
    order = removal_order(maps)[0]
    assert sorted(order.tolist()) == list(range(len(scores)))
    assert (maps.flatten()[order].diff() >= 0).all()


def test_ties_are_not_broken_from_one_corner() -> None:
    first_half = removal_order(torch.zeros(1, 14, 14))[0, :98]
    assert 0.3 < (first_half < 98).float().mean() < 0.7
    together = removal_order(torch.zeros(3, 14, 14))
    assert torch.equal(together[2, :98], first_half)


def test_outcomes_of_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0], [1.0, 3.0, 1.0]])
    found = outcomes(logits, torch.tensor([1, 0]))
    p = logits[0].softmax(-1)
    assert torch.allclose(found, torch.tensor([[1.0, p[1], 3.0], [0.0, p[0], 1.0]]))
    assert outcomes(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match="B×h×w"):
        removal_order(torch.zeros(3, 4))
    with pytest.raises(NonFiniteError):
        removal_order(torch.full((1, 2, 2), float("nan")))
