"""Localisation of maps against boxes and against exact masks, gathered over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_classemb.errors import InputError
from captum_classemb.evaluation.localisation_scores import (
    SegmentationCounts,
    average_precision,
    energy_inside,
    mask_share,
    mean_iou,
    pixel_accuracy,
    pointing_game,
    segmentation_counts,
)
from captum_classemb.functional.grid import tile


def _pixels(maps: Tensor, masks: Tensor) -> Tensor:
    """Maps B×H×W from patch scores B×h×w or attributions B×channels×H×W."""
    if masks.dim() != 3 or maps.dim() not in (3, 4) or len(maps) != len(masks):
        raise InputError(
            f"maps of shape {tuple(maps.shape)} and masks of shape {tuple(masks.shape)} were "
            "given: maps are B×h×w or B×channels×H×W, masks B×H×W."
        )
    if maps.dim() == 4:
        return maps.sum(1)
    size = (masks.shape[1], masks.shape[2])
    return maps if maps.shape == masks.shape else tile(maps, size)


class BoxLocalisation(Metric):
    """Energy inside the boxes and the pointing game.

    Args:
        smallest: energy is taken over images whose boxes cover at least this share: a map can
            hardly miss a box that fills the image, nor hit one of a few pixels.
        largest: … and at most this share.
        kwargs: further arguments of ``torchmetrics.Metric``.

    Examples:
        >>> boxes = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> boxes[:, :2, :2] = True
        >>> metric = BoxLocalisation()
        >>> metric.update(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), boxes)
        >>> {name: round(float(value), 2) for name, value in metric.compute().items()}
        {'energy': 0.75, 'box_area': 0.25, 'pointing': 1.0}
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, smallest: float = 0.05, largest: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.smallest, self.largest = smallest, largest
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, maps: Tensor, boxes: Tensor) -> None:
        """Add a batch: maps B×h×w or B×channels×H×W, unions of boxes as masks B×H×W."""
        pixels = _pixels(maps, boxes)
        area = mask_share(boxes)
        self.rows.append(
            torch.stack([energy_inside(pixels, boxes), area, pointing_game(pixels, boxes)], -1)
        )

    def images(self) -> dict[str, Tensor]:
        """One value an image, in order; NaN for the energy of images that it leaves out."""
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)
        energy, area, pointing = rows.unbind(-1)
        counted = (area >= self.smallest) & (area <= self.largest)
        nan = torch.full_like(area, torch.nan)
        return {
            "energy": torch.where(counted, energy, nan),
            "box_area": torch.where(counted, area, nan),
            "pointing": pointing,
        }

    def compute(self) -> dict[str, Tensor]:
        """Means: ``"energy"``, ``"box_area"`` (a uniform map's energy), ``"pointing"``."""
        return {name: values.nanmean() for name, values in self.images().items()}


class MaskLocalisation(Metric):
    """Pixel accuracy, mean IoU, average precision and energy against exact masks.

    Pixel accuracy and IoU threshold each map at its mean; they count pixels over all images, as
    segmentation benchmarks do. Average precision and energy are means over images.

    Args:
        kwargs: further arguments of ``torchmetrics.Metric``.

    Examples:
        >>> masks = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> masks[:, :2, :2] = True
        >>> metric = MaskLocalisation()
        >>> metric.update(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), masks)
        >>> {name: round(float(value), 2) for name, value in metric.compute().items()}
        {'pixel_accuracy': 1.0, 'mean_iou': 1.0, 'average_precision': 1.0, 'energy': 0.75}
    """

    full_state_update = False
    rows: list[Tensor]
    intersection: Tensor
    union: Tensor
    pixels: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        for name, size in (("intersection", (2,)), ("union", (2,)), ("pixels", ())):
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch: maps B×h×w or B×channels×H×W, object masks B×H×W."""
        pixels = _pixels(maps, masks)
        counts = segmentation_counts(pixels, masks)
        self.rows.append(
            torch.stack([average_precision(pixels, masks), energy_inside(pixels, masks)], -1)
        )
        self.intersection = self.intersection + counts.intersection.sum(0)
        self.union = self.union + counts.union.sum(0)
        self.pixels = self.pixels + counts.pixels.sum()

    def images(self) -> dict[str, Tensor]:
        """One value an image, in order: ``"average_precision"`` and ``"energy"``."""
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)
        precision, energy = rows.unbind(-1)
        return {"average_precision": precision, "energy": energy}

    def compute(self) -> dict[str, Tensor]:
        """``"pixel_accuracy"``, ``"mean_iou"``, ``"average_precision"`` and ``"energy"``."""
        counts = SegmentationCounts(self.intersection, self.union, self.pixels)
        return {
            "pixel_accuracy": pixel_accuracy(counts),
            "mean_iou": mean_iou(counts),
            **{name: values.mean() for name, values in self.images().items()},
        }
