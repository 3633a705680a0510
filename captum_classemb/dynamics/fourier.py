"""Log amplitudes of feature maps by spatial frequency (Park & Kim 2022, Figures 2a and 8).

``variant="paper"`` is what the published notebook computes: the diagonal of the shifted spectrum
from zero frequency on, which on an even grid leaves the highest frequency out.
``variant="corrected"`` is the mean over rings of equal radial frequency, up to the highest one.
Either comes with the frequencies it was really taken at, in radians per grid cell.
"""

from __future__ import annotations

from math import pi
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.functional.variant import Variant

# Amplitudes are bounded away from zero before the logarithm, as published.
_FLOOR = 1e-6


def check_maps(maps: Tensor) -> None:
    """Refuse what is no batch of feature maps B×C×h×w of at least 2×2 cells."""
    if maps.dim() != 4 or min(maps.shape[-2:]) < 2:
        raise InputError(
            "Feature maps B×C×h×w of at least 2×2 cells are needed, but a tensor of shape "
            f"{tuple(maps.shape)} was given."
        )


def check_finite(statistic: Tensor) -> Tensor:
    """Refuse a statistic that shows NaN or infinity in the feature maps it was taken of."""
    if not bool(torch.isfinite(statistic).all()):
        raise NonFiniteError(
            "The feature maps hold NaN or infinity: check the model's weights and its inputs."
        )
    return statistic


def log_amplitude(maps: Tensor) -> Tensor:
    """Mean log amplitude of the 2-D Fourier transform, half of which says all.

    Args:
        maps: B×C×h×w.

    Returns:
        h×(⌊w/2⌋+1): mean over B and C of ``log(|F| + 1e-6)``, rows in the order of
        ``torch.fft.fftfreq(h)``, columns of ``torch.fft.rfftfreq(w)``.

    Examples:
        >>> log_amplitude(torch.ones(1, 1, 2, 2)).shape
        torch.Size([2, 2])
    """
    x = maps if maps.dtype == torch.float64 else maps.float()
    # The square root of the power costs a quarter of what abs of a complex number does.
    parts: Tensor = torch.view_as_real(torch.fft.rfft2(x)).square_()
    power = parts[..., 0] + parts[..., 1]
    return power.sqrt_().add_(_FLOOR).log_().mean((0, 1))


def _radii(grid: tuple[int, int]) -> Tensor:
    """Radial frequency of each bin of :func:`log_amplitude`, in radians per cell."""
    rows = torch.fft.fftfreq(grid[0], dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(grid[1], dtype=torch.float64)[None]
    return 2 * pi * torch.sqrt(rows.square() + columns.square())


def _diagonal_bins(grid: tuple[int, int], variant: Variant) -> tuple[Tensor, Tensor]:
    """Rows and columns of the diagonal; where h ≠ w, the bins nearest to it."""
    h, w = grid
    steps = min(h, w)
    # Published: the shifted diagonal from ⌊n/2⌋ on, whose last bin is the last positive frequency.
    bins = (steps + 1) // 2 if variant == "paper" else steps // 2 + 1
    at = torch.arange(bins, dtype=torch.float64) / steps
    return torch.round(at * h).long(), torch.round(at * w).long()


def diagonal(spectrum: Tensor, grid: tuple[int, int], variant: Variant = "corrected") -> Tensor:
    """The diagonal of a spectrum, from zero frequency to the highest one.

    Args:
        spectrum: h×(⌊w/2⌋+1) of :func:`log_amplitude`.
        grid: h, w.
        variant: ``"paper"`` stops before the Nyquist frequency of an even grid.

    Returns:
        One value per frequency.
    """
    rows, columns = _diagonal_bins(grid, variant)
    return spectrum[rows, columns]


def _rings(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Ring of each bin (−1 beyond the axis' highest frequency), and how often the bin counts."""
    n = min(grid)
    ring = torch.round(_radii(grid) * n / (2 * pi)).long()
    columns = torch.arange(grid[1] // 2 + 1)
    # A bin stands for its mirror image too, but in the columns that mirror onto themselves.
    alone = (columns == 0) | (2 * columns == grid[1])
    weight = torch.where(alone, 1.0, 2.0).double().expand(grid[0], -1)
    return torch.where(ring > n // 2, -1, ring), weight


def radial_mean(spectrum: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over rings of equal radial frequency, one cell of the shorter axis wide.

    Args:
        spectrum: h×(⌊w/2⌋+1) of :func:`log_amplitude`.
        grid: h, w.

    Returns:
        ⌊min(h, w)/2⌋+1 values. The corners of the spectrum, beyond the highest frequency of an
        axis, are left out.
    """
    ring, weight = (x.to(spectrum.device) for x in _rings(grid))
    inside = ring >= 0
    bins = min(grid) // 2 + 1
    weight = weight.to(spectrum)
    total = spectrum.new_zeros(bins).index_add_(0, ring[inside], (spectrum * weight)[inside])
    return total / weight.new_zeros(bins).index_add_(0, ring[inside], weight[inside])


def frequencies(grid: tuple[int, int], variant: Variant) -> Tensor:
    """The frequencies, in radians per cell of each axis, of what :func:`relative` gives.

    Of the diagonal it is the frequency along either axis; of a ring the mean radial frequency of
    the bins in it. A grid with an even shorter side reaches π.

    Examples:
        >>> frequencies((4, 4), "paper") / pi
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    if variant == "paper":
        rows, columns = _diagonal_bins(grid, variant)
        return pi * (rows / grid[0] + columns / grid[1]).double()
    ring, weight = _rings(grid)
    inside = ring >= 0
    bins = min(grid) // 2 + 1
    weight, ring, radii = weight[inside], ring[inside], _radii(grid)[inside]
    total = torch.zeros(bins, dtype=torch.float64).index_add_(0, ring, radii * weight)
    return total / torch.zeros(bins, dtype=torch.float64).index_add_(0, ring, weight)


def relative(spectrum: Tensor, grid: tuple[int, int], variant: Variant) -> Tensor:
    """Δ log amplitude: each frequency against zero frequency, along the variant's axis."""
    line = diagonal(spectrum, grid, "paper") if variant == "paper" else radial_mean(spectrum, grid)
    return line - line[0]


class FourierAmplitude(Metric):
    """Streaming Δ log amplitude of one step's feature maps.

    ``update(maps)`` takes B×C×h×w, always of the same grid; ``compute()`` gives one value per
    frequency of :attr:`frequencies`.

    Args:
        variant: ``"paper"`` or ``"corrected"``.

    Examples:
        >>> metric = FourierAmplitude("corrected")
        >>> metric.update(torch.ones(2, 3, 4, 4))
        >>> metric.compute().shape
        torch.Size([3])
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    spectrum: Tensor
    images: Tensor
    grid: Tensor

    def __init__(self, variant: Variant = "corrected", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if variant not in ("paper", "corrected"):
            raise InputError(f'variant is "paper" or "corrected", not {variant!r}.')
        self.variant = variant
        self.add_state("spectrum", torch.zeros(1, 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("grid", torch.zeros(2, dtype=torch.long), dist_reduce_fx="max")

    def update(self, maps: Tensor) -> None:
        """Add the spectra of B×C×h×w."""
        check_maps(maps)
        h, w = maps.shape[-2:]
        if bool(self.images) and self._grid() != (h, w):
            raise InputError(
                f"Feature maps of {h}×{w} were given after maps of {self._grid()}: one size of "
                "image is needed."
            )
        spectrum = check_finite(log_amplitude(maps))
        if self.spectrum.shape != spectrum.shape:
            self.grid = torch.tensor([h, w], device=self.grid.device)
            self.spectrum = torch.zeros_like(spectrum, dtype=torch.float64)
        # Sums over many images are kept in double precision, means over a batch are not.
        self.spectrum.add_(spectrum, alpha=maps.shape[0])
        self.images.add_(maps.shape[0])

    def compute(self) -> Tensor:
        """Δ log amplitude, one value per frequency."""
        return relative(self.spectrum / self.images, self._grid(), self.variant).float()

    @property
    def frequencies(self) -> Tensor:
        """The frequencies of :meth:`compute`, in radians per cell."""
        return frequencies(self._grid(), self.variant)

    def _grid(self) -> tuple[int, int]:
        return int(self.grid[0]), int(self.grid[1])
