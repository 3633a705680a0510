"""Accuracy under noise of one frequency band (Park & Kim 2022, Figures 2b and D.2).

x' = x + F⁻¹(F(ε)·M_band), ε white noise and M_band a ring of spatial frequencies, scaled so that
the noise of every band and image has exactly the same energy.
"""

from __future__ import annotations

from math import pi
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.dynamics.inference import LabelledMetric, check_labels, logits_of
from captum_classemb.dynamics.tracing.feature_maps import evaluating
from captum_classemb.errors import InputError


def band_edges(bands: int) -> Tensor:
    """Edges of bands of equal width from 0 to π radians per pixel, bands+1 values."""
    if bands < 1:
        raise InputError(f"At least one frequency band is needed, not {bands}.")
    return torch.linspace(0, pi, bands + 1, dtype=torch.float64)


def _ring(size: tuple[int, int], low: float, high: float) -> Tensor:
    """Bins of ``rfft2`` whose radial frequency lies in [low, high)."""
    rows = torch.fft.fftfreq(size[0], dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(size[1], dtype=torch.float64)[None]
    radius = 2 * pi * torch.sqrt(rows.square() + columns.square())
    return (radius >= low) & (radius < high)


def band_noise(
    shape: tuple[int, ...], low: float, high: float, rms: float, generator: torch.Generator
) -> Tensor:
    """Noise that lies in one band, of a given root mean square per image.

    Args:
        shape: B×C×H×W.
        low: lowest frequency, radians per pixel.
        high: first frequency that does not belong to the band.
        rms: root mean square over the pixels and channels of each image.
        generator: a CPU generator.

    Returns:
        B×C×H×W.

    Raises:
        InputError: images of this size have no frequency in the band.
    """
    h, w = shape[-2:]
    ring = _ring((h, w), low, high)
    if not bool(ring.any()):
        raise InputError(
            f"Images of {h}×{w} have no frequency from {low / pi:.3f}π to {high / pi:.3f}π: ask "
            "for fewer bands."
        )
    white = torch.randn(shape, generator=generator)
    noise: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * ring, s=(h, w))
    return noise * (rms / noise.square().mean((1, 2, 3), keepdim=True).sqrt())


class FrequencyNoise(LabelledMetric):
    """Streaming accuracy without noise and with noise of each band.

    ``update(model, images, labels)`` takes images as the model does, so the noise is measured in
    units of its normalised input. ``compute()`` gives bands+1 accuracies, the first without
    noise. The noise of an image depends on the seed and on how many images came before.

    Args:
        bands: number of bands of equal width up to π.
        rms: root mean square of the noise.
        seed: of the noise.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    images: Tensor

    def __init__(self, bands: int = 10, rms: float = 0.3, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if rms <= 0:
            raise InputError(f"The noise needs a positive root mean square, not {rms}.")
        self.edges, self.rms, self.seed = band_edges(bands), rms, seed
        self.add_state("correct", torch.zeros(bands + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, draw: int | None = None
    ) -> None:
        """Add one batch; ``draw`` says which noise it gets, by default that of its turn."""
        draw = int(self.images) if draw is None else draw
        generator = torch.Generator().manual_seed(self.seed + draw)
        edges = self.edges.tolist()
        with evaluating(model):
            for i in range(len(edges)):
                noisy = images
                if i:
                    shape = tuple(images.shape)
                    noise = band_noise(shape, edges[i - 1], edges[i], self.rms, generator)
                    noisy = images + noise.to(images)
                logits = logits_of(model, noisy)
                check_labels(logits, labels)
                self.correct[i] += (logits.argmax(1) == labels).sum()
        self.images = self.images + images.shape[0]

    def compute(self) -> Tensor:
        """Accuracy without noise, then by band."""
        return self.correct.float() / self.images

    @property
    def centres(self) -> Tensor:
        """The middle frequency of each band, in radians per pixel."""
        return (self.edges[1:] + self.edges[:-1]) / 2
