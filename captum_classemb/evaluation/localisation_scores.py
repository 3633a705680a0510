"""How well a map finds the object, given its boxes or its exact mask.

Every function takes maps …×H×W and boolean masks …×H×W and returns one number an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_classemb.errors import InputError, NonFiniteError


def _checked(maps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if maps.shape != mask.shape or maps.dim() < 2:
        raise InputError(
            f"maps of shape {tuple(maps.shape)} do not fit masks of shape {tuple(mask.shape)}: "
            "both are …×H×W."
        )
    if mask.dtype != torch.bool:
        raise InputError(f"masks are boolean tensors, not {mask.dtype}.")
    if not torch.isfinite(maps).all():
        raise NonFiniteError("a map holds NaN or infinity: localisation needs finite numbers.")
    return maps.double().flatten(-2), mask.to(maps.device).flatten(-2)


def mask_share(mask: Tensor) -> Tensor:
    """Share of the image that the mask covers: what a uniform map's energy inside is."""
    return mask.double().mean((-2, -1))


def energy_inside(maps: Tensor, mask: Tensor) -> Tensor:
    """Share of the map's positive part that lies inside the mask.

    A map without any positive part prefers no place, so it scores as the uniform map does.

    Raises:
        InputError: if the shapes differ or the mask is not boolean.
        NonFiniteError: if a map holds NaN or infinity.

    Examples:
        >>> left = torch.tensor([[True, False], [True, False]])
        >>> energy_inside(torch.tensor([[3.0, 1.0], [-5.0, 0.0]]), left)
        tensor(0.7500, dtype=torch.float64)
    """
    maps, mask = _checked(maps, mask)
    positive = maps.clamp(min=0)
    total = positive.sum(-1)
    share = (positive * mask).sum(-1) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, share, mask.double().mean(-1))


def pointing_game(maps: Tensor, mask: Tensor) -> Tensor:
    """Whether the map's maximum lies inside the mask (Zhang et al. 2018, without a margin).

    Where several pixels share the maximum (all those of one patch do), the share of them that is
    inside: the chance of a hit when one of them is drawn.

    Raises:
        InputError: if the shapes differ or the mask is not boolean.
        NonFiniteError: if a map holds NaN or infinity.
    """
    maps, mask = _checked(maps, mask)
    highest = maps == maps.amax(-1, keepdim=True)
    return (highest & mask).sum(-1).double() / highest.sum(-1)


class SegmentationCounts(NamedTuple):
    """Pixel counts of one image or of many added up; background first, object second."""

    intersection: Tensor
    """…×2, pixels that the map and the mask put into the same class."""
    union: Tensor
    """…×2, pixels that one of the two puts into this class."""
    pixels: Tensor
    """…, all pixels."""


def segmentation_counts(maps: Tensor, mask: Tensor) -> SegmentationCounts:
    """Compare a mask with the pixels above the map's mean (Chefer et al. CVPR 2021, §4).

    Raises:
        InputError: if the shapes differ or the mask is not boolean.
        NonFiniteError: if a map holds NaN or infinity.
    """
    maps, mask = _checked(maps, mask)
    found = maps > maps.mean(-1, keepdim=True)
    pairs = torch.stack([~found, found]), torch.stack([~mask, mask])
    intersection = (pairs[0] & pairs[1]).sum(-1).movedim(0, -1)
    union = (pairs[0] | pairs[1]).sum(-1).movedim(0, -1)
    return SegmentationCounts(intersection, union, torch.full_like(union[..., 0], maps.shape[-1]))


def pixel_accuracy(counts: SegmentationCounts) -> Tensor:
    """Share of pixels put into the right class."""
    return counts.intersection.sum(-1).double() / counts.pixels


def mean_iou(counts: SegmentationCounts) -> Tensor:
    """Intersection over union, averaged over background and object; an absent class scores 1."""
    union = counts.union.double()
    iou = torch.where(union > 0, counts.intersection / union.clamp(min=1), 1.0)
    return iou.mean(-1)


def average_precision(maps: Tensor, mask: Tensor) -> Tensor:
    """Σ over thresholds of precision × the recall gained, pixels ranked by the map.

    Pixels of equal value are accepted together, so a constant map scores the mask's share of the
    image whatever the order of its pixels.

    Raises:
        InputError: if the shapes differ, the mask is not boolean, or a mask is empty.
        NonFiniteError: if a map holds NaN or infinity.

    Examples:
        >>> left = torch.tensor([[True, False], [True, False]])
        >>> average_precision(torch.zeros(2, 2), left)
        tensor(0.5000, dtype=torch.float64)
    """
    maps, mask = _checked(maps, mask)
    if not mask.any(-1).all():
        raise InputError("a mask is empty: average precision needs at least one object pixel.")
    ranked, order = maps.sort(-1, descending=True)
    hits = mask.gather(-1, order).double().cumsum(-1)
    accepted = torch.arange(1, maps.shape[-1] + 1, dtype=torch.float64, device=maps.device)
    # The last pixel of each run of equal values stands for the whole run.
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[..., :-1] = ranked[..., :-1] != ranked[..., 1:]
    recall = hits / hits[..., -1:]
    before = torch.where(last, recall, 0.0).cummax(-1).values
    gained = recall - torch.nn.functional.pad(before[..., :-1], (1, 0))
    return (torch.where(last, hits / accepted, 0.0) * gained).sum(-1)
