"""Localisation scores: closed forms by hand, brute force, scikit-learn, and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from captum_classemb.data import boxes_to_mask
from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.evaluation import localisation_scores as loc

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8)


@st.composite
def maps_and_masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(shapes)
    # Few distinct values, so that ties are the rule.
    maps = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])))
    mask = draw(hnp.arrays(np.bool_, shape))
    return torch.from_numpy(maps), torch.from_numpy(mask)


def test_the_share_of_a_mask() -> None:
    mask = torch.tensor([[True, True, True, False], [False, True, True, False]])
    assert loc.mask_share(mask).item() == 5 / 8


@given(maps_and_masks())
def test_energy_is_the_positive_share_inside(pair: tuple[Tensor, Tensor]) -> None:
    maps, mask = pair
    inside = sum(max(v, 0) for v, m in zip(maps.flatten(), mask.flatten(), strict=True) if m)
    total = sum(max(v, 0) for v in maps.flatten())
    expected = inside / total if total > 0 else mask.double().mean()
    assert loc.energy_inside(maps, mask).item() == pytest.approx(float(expected))
    assert loc.energy_inside(maps * 7, mask).item() == pytest.approx(float(expected))


@given(maps_and_masks())
def test_a_uniform_map_scores_the_area_of_the_mask(pair: tuple[Tensor, Tensor]) -> None:
    mask = pair[1]
    uniform = torch.ones(mask.shape)
    for score in (loc.energy_inside, loc.pointing_game):
        assert score(uniform, mask).item() == pytest.approx(loc.mask_share(mask).item())


@given(maps_and_masks())
def test_the_pointing_game_shares_the_hit_among_tied_maxima(pair: tuple[Tensor, Tensor]) -> None:
    maps, mask = pair
    hits = mask[maps == maps.max()]
    assert loc.pointing_game(maps, mask).item() == pytest.approx(hits.double().mean().item())


@given(maps_and_masks())
def test_average_precision_is_that_of_scikit_learn(pair: tuple[Tensor, Tensor]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    maps, mask = pair
    assume(bool(mask.any()))
    expected = metrics.average_precision_score(mask.flatten().numpy(), maps.flatten().numpy())
    assert loc.average_precision(maps, mask).item() == pytest.approx(expected, abs=1e-12)


@given(maps_and_masks())
def test_segmentation_counts_by_brute_force(pair: tuple[Tensor, Tensor]) -> None:
    maps, mask = pair
    found = (maps.double() > maps.double().mean()).numpy()
    truth = mask.numpy()
    counts = loc.segmentation_counts(maps, mask)
    assert loc.pixel_accuracy(counts).item() == pytest.approx((found == truth).mean())
    ious = []
    for of_map, of_mask in ((~found, ~truth), (found, truth)):
        union = (of_map | of_mask).sum()
        ious.append((of_map & of_mask).sum() / union if union else 1.0)
    assert loc.mean_iou(counts).item() == pytest.approx(np.mean(ious))


def test_leading_dimensions_are_images() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 5, 4, generator=generator)
    mask = torch.randn(2, 3, 5, 4, generator=generator) > 0
    scores = (loc.energy_inside, loc.pointing_game, loc.average_precision)
    for score in scores:
        together = score(maps, mask)
        assert together.shape == (2, 3)
        assert together[1, 2].item() == pytest.approx(score(maps[1, 2], mask[1, 2]).item())
    counts = loc.segmentation_counts(maps, mask)
    assert counts.intersection.shape == (2, 3, 2) and counts.pixels.shape == (2, 3)
    assert torch.equal(counts.union[1, 2], loc.segmentation_counts(maps[1, 2], mask[1, 2]).union)


def test_the_mask_itself_is_the_best_map_and_its_complement_the_worst() -> None:
    mask = boxes_to_mask([(1, 1, 3, 3)], (4, 4)).bool()
    oracle, reverse = mask.float(), (~mask).float()
    assert loc.energy_inside(oracle, mask) == 1 and loc.energy_inside(reverse, mask) == 0
    assert loc.pointing_game(oracle, mask) == 1 and loc.pointing_game(reverse, mask) == 0
    assert loc.average_precision(oracle, mask) == 1
    assert loc.average_precision(reverse, mask) == 4 / 16
    assert loc.mean_iou(loc.segmentation_counts(oracle, mask)) == 1
    assert loc.mean_iou(loc.segmentation_counts(reverse, mask)) == 0


def test_refusals_say_what_is_wrong() -> None:
    maps, mask = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="do not fit"):
        loc.energy_inside(maps[None], mask)
    with pytest.raises(InputError, match="boolean"):
        loc.pointing_game(maps, mask.float())
    with pytest.raises(NonFiniteError):
        loc.segmentation_counts(maps / 0, mask)
    with pytest.raises(InputError, match="empty"):
        loc.average_precision(maps, mask)
