"""The gathering metrics give what their pure functions give, whatever the batches."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from captum_classemb.data import boxes_to_mask
from captum_classemb.errors import InputError
from captum_classemb.evaluation import localisation_scores as loc
from captum_classemb.evaluation.localisation import BoxLocalisation, MaskLocalisation
from captum_classemb.functional.grid import spread, tile


def maps_and_masks() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 4, 4, generator=generator, dtype=torch.float64)
    boxes = [(0, 0, 2, 2), (0, 0, 16, 16), (3, 3, 9, 11), (1, 0, 10, 10), (0, 0, 8, 16)]
    return maps, torch.stack([boxes_to_mask([box], (16, 16)).bool() for box in boxes])


def test_energy_leaves_out_tiny_and_huge_boxes_and_the_pointing_game_does_not() -> None:
    maps, masks = maps_and_masks()
    metric = BoxLocalisation()
    metric.update(maps, masks)
    pixels, counted = tile(maps, (16, 16)), [2, 3, 4]
    found = metric.compute()
    energy = loc.energy_inside(pixels[counted], masks[counted])
    assert found["energy"].item() == pytest.approx(energy.mean().item())
    area = loc.mask_share(masks[counted])
    assert found["box_area"].item() == pytest.approx(area.mean().item())
    pointing = loc.pointing_game(pixels, masks)
    assert found["pointing"].item() == pytest.approx(pointing.mean().item())
    assert metric.images()["energy"].isnan().tolist() == [True, True, False, False, False]


def test_masks_are_counted_over_all_images() -> None:
    maps, masks = maps_and_masks()
    metric = MaskLocalisation()
    metric.update(maps, masks)
    found, truth = tile(maps, (16, 16)), masks
    above = found > found.mean((1, 2), keepdim=True)
    assert metric.compute()["pixel_accuracy"].item() == pytest.approx(
        (above == truth).double().mean().item()
    )
    ious = [
        ((above == side) & (truth == side)).sum() / ((above == side) | (truth == side)).sum()
        for side in (False, True)
    ]
    assert metric.compute()["mean_iou"].item() == pytest.approx(sum(ious).item() / 2)
    precision = loc.average_precision(found, truth).mean()
    assert metric.compute()["average_precision"].item() == pytest.approx(precision.item())


@pytest.mark.parametrize("metric_class", [BoxLocalisation, MaskLocalisation])
def test_batches_pixels_and_pickles_change_nothing(
    metric_class: type[BoxLocalisation | MaskLocalisation],
) -> None:
    maps, masks = maps_and_masks()
    whole, parts = metric_class(), metric_class()
    whole.update(maps, masks)
    parts.update(spread(maps[:2], (16, 16), 3), masks[:2])
    parts = pickle.loads(pickle.dumps(parts))
    parts.update(maps[2:], masks[2:])
    for name, value in whole.compute().items():
        assert parts.compute()[name].item() == pytest.approx(value.item()), name
    parts.reset()
    parts.update(maps[2:], masks[2:])
    assert len(parts.images()["energy"]) == 3


def test_refusals_say_what_is_wrong() -> None:
    maps, masks = maps_and_masks()
    with pytest.raises(InputError, match="B×h×w or"):
        BoxLocalisation().update(maps[0], masks[0])
    with pytest.raises(InputError, match="boolean"):
        MaskLocalisation().update(maps, masks.float())
