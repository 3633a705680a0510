"""Means over images with bootstrap intervals, and paired differences between two methods."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_classemb.errors import InputError, NonFiniteError

_CHUNK = 1 << 22
"""Largest number of drawn values held at once."""


class Interval(NamedTuple):
    """A mean over ``images`` images and its percentile bootstrap interval."""

    mean: float
    low: float
    high: float
    images: int


def bootstrap_mean(
    values: Tensor, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The mean of one value an image, with a percentile bootstrap interval over images.

    Args:
        values: one value an image, B.
        seed: the same seed draws the same images, whatever ``values`` holds.
        resamples: how often the images are drawn anew, with replacement.
        level: coverage of the interval, between 0 and 1.

    Raises:
        InputError: if ``values`` is no vector or empty, or an option is out of range.
        NonFiniteError: if a value is NaN or infinite.

    Examples:
        >>> bootstrap_mean(torch.tensor([2.0, 2.0, 2.0]))
        Interval(mean=2.0, low=2.0, high=2.0, images=3)
    """
    if values.dim() != 1 or len(values) == 0:
        raise InputError(f"values of shape {tuple(values.shape)} are not one value an image.")
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level {level} must lie between 0 and 1, resamples {resamples} above 0.")
    if not torch.isfinite(values).all():
        raise NonFiniteError("values hold NaN or infinity: a mean needs finite numbers.")
    values = values.detach().double().cpu()
    count = len(values)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // count)
    means = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), count)
        index = torch.randint(count, shape, generator=generator)
        means.append(values[index].mean(1))
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(float(values.mean()), float(low), float(high), count)


def paired_difference(
    first: Tensor, second: Tensor, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Mean of ``first − second`` over the same images, with its interval.

    Args:
        first: one value an image, B.
        second: one value for each of the same images, in the same order, B.
        seed: as for :func:`bootstrap_mean`.
        resamples: as for :func:`bootstrap_mean`.
        level: as for :func:`bootstrap_mean`.

    Raises:
        InputError: if the two differ in length, and as :func:`bootstrap_mean` says.
        NonFiniteError: if a value is NaN or infinite.
    """
    if first.shape != second.shape:
        raise InputError(
            f"paired values must belong to the same images: {tuple(first.shape)} against "
            f"{tuple(second.shape)}."
        )
    difference = first.double() - second.double()
    return bootstrap_mean(difference, seed=seed, resamples=resamples, level=level)
