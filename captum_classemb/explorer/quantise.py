"""Maps as bytes: one step size for each map, and 0 kept exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captum_classemb.errors import NonFiniteError

Floats = npt.NDArray[np.floating]

#: The byte that stands for 0 in maps that hold negative scores.
CENTRE = 128


@dataclass(frozen=True)
class Quantised:
    """Maps in 8 bits: score = (byte − zero) · step.

    Args:
        levels: …×h×w, uint8.
        steps: …, float32: the size of a step of each map. Scores are right to half of it.
        zero: the byte that stands for 0.
    """

    levels: npt.NDArray[np.uint8]
    steps: npt.NDArray[np.float32]
    zero: int

    def first(self, count: int) -> Quantised:
        """The first maps alone."""
        return Quantised(self.levels[:count], self.steps[:count], self.zero)

    @property
    def scores(self) -> Floats:
        """The scores that the bytes stand for: …×h×w."""
        return (self.levels.astype(np.float32) - self.zero) * self.steps[..., None, None]


def quantise(maps: npt.ArrayLike) -> Quantised:
    """Store maps in 8 bits, each with a scale of its own.

    Args:
        maps: …×h×w.

    Raises:
        NonFiniteError: if a score is NaN or infinite.

    Examples:
        >>> stored = quantise([[[0.0, 0.6, 1.0]], [[0.0, 0.0, 0.0]]])
        >>> stored.levels.tolist(), stored.zero
        ([[[0, 153, 255]], [[0, 0, 0]]], 0)
    """
    scores = np.asarray(maps, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise NonFiniteError("The maps hold NaN or infinity: finite scores are needed.")
    signed = bool((scores < 0).any())
    zero, span = (CENTRE, 127) if signed else (0, 255)
    steps = (np.abs(scores).max((-2, -1)) / span).astype(np.float32)
    # A map of zeros has no scale: any step will do.
    divisor = np.where(steps > 0, steps, 1.0)[..., None, None]
    # Rounding the step to 32 bits may lift the largest score past the last level.
    levels = np.clip(np.rint(scores / divisor), -span, span) + zero
    return Quantised(levels.astype(np.uint8), steps, zero)
