"""Variance of feature maps over space, by depth (Park & Kim 2022, Figure 9).

``variant="paper"`` is the published mean over channels of the variance over space, which grows
with the residual stream itself. ``variant="corrected"`` is the share of the feature map's energy
that varies over space, Σ_c Var(x_c) / Σ_c E[x_c²], between 0 (constant) and 1 (mean zero).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_classemb.dynamics.fourier import check_finite, check_maps
from captum_classemb.errors import InputError
from captum_classemb.functional.variant import Variant


def _moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over space and mean square about it: B×C each."""
    # Two passes over tokens in the order they lie in memory; torch.var takes three times as long.
    tokens = maps.flatten(2).transpose(1, 2)
    mean = tokens.mean(1)
    return mean, (tokens - mean[:, None]).square_().mean(1)


def _unbiased(varying: Tensor, maps: Tensor) -> Tensor:
    cells = maps.shape[-2] * maps.shape[-1]
    return varying * (cells / (cells - 1))


def _share(mean: Tensor, varying: Tensor) -> Tensor:
    energy = (mean.square() + varying).sum(-1)
    return varying.sum(-1) / energy.clamp_min(torch.finfo(energy.dtype).tiny)


def channel_variance(maps: Tensor) -> Tensor:
    """Unbiased variance over space: B×C×h×w to B×C."""
    return _unbiased(_moments(maps)[1], maps)


def varying_energy(maps: Tensor) -> Tensor:
    """Share of each image's energy that varies over space: B×C×h×w to B, 0 for a zero map."""
    return _share(*_moments(maps))


def largest_channel_share(variance: Tensor) -> Tensor:
    """Share of the variance (…×C) that the one largest channel carries: from 1/C to 1."""
    total = variance.sum(-1).clamp_min(torch.finfo(variance.dtype).tiny)
    return variance.amax(-1) / total


class FeatureMapVariance(Metric):
    """Streaming variance of one step's feature maps; ``update(maps)`` takes B×C×h×w.

    Args:
        variant: ``"paper"`` or ``"corrected"``.

    Examples:
        >>> metric = FeatureMapVariance("paper")
        >>> metric.update(torch.tensor([[[[0.0, 2.0], [0.0, 2.0]]]]))
        >>> round(float(metric.compute()), 4)
        1.3333
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    total: Tensor
    largest: Tensor
    images: Tensor

    def __init__(self, variant: Variant = "corrected", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if variant not in ("paper", "corrected"):
            raise InputError(f'variant is "paper" or "corrected", not {variant!r}.')
        self.variant = variant
        for name in ("total", "largest", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, maps: Tensor) -> None:
        """Add B×C×h×w."""
        check_maps(maps)
        x = maps if maps.dtype == torch.float64 else maps.float()
        mean, varying = _moments(x)
        paper = self.variant == "paper"
        value = _unbiased(varying, x).mean(-1) if paper else _share(mean, varying)
        self.total.add_(check_finite(value.double().sum()))
        self.largest.add_(largest_channel_share(varying).double().sum())
        self.images.add_(maps.shape[0])

    def compute(self) -> Tensor:
        """Mean over images, a scalar."""
        return (self.total / self.images).float()

    def largest_channel(self) -> Tensor:
        """Mean over images of the share of the variance that the largest channel carries.

        Near 1 the published measure tells of a single channel's few very large activations.
        """
        return (self.largest / self.images).float()
