"""Pure drawing in numpy: textures, handwritten glyphs and line figures, as H×W arrays in 0..1."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TEXTURES: Final = (
    "horizontal stripes",
    "vertical stripes",
    "diagonal stripes",
    "checks",
    "dots",
    "rings",
    "waves",
    "bricks",
    "clouds",
    "grain",
)

# Polylines in a box of side 1 around the origin, (x right, y down). None can be read as a digit.
FIGURES: Final[dict[str, tuple[tuple[tuple[float, float], ...], ...]]] = {
    "A": (((-0.4, 0.5), (0.0, -0.5), (0.4, 0.5)), ((-0.22, 0.1), (0.22, 0.1))),
    "E": (((0.35, -0.5), (-0.35, -0.5), (-0.35, 0.5), (0.35, 0.5)), ((-0.35, 0.0), (0.25, 0.0))),
    "H": (((-0.35, -0.5), (-0.35, 0.5)), ((0.35, -0.5), (0.35, 0.5)), ((-0.35, 0.0), (0.35, 0.0))),
    "K": (((-0.35, -0.5), (-0.35, 0.5)), ((0.35, -0.5), (-0.3, 0.0), (0.35, 0.5))),
    "M": (((-0.45, 0.5), (-0.4, -0.5), (0.0, 0.15), (0.4, -0.5), (0.45, 0.5)),),
    "N": (((-0.35, 0.5), (-0.35, -0.5), (0.35, 0.5), (0.35, -0.5)),),
    "W": (((-0.5, -0.5), (-0.25, 0.5), (0.0, -0.2), (0.25, 0.5), (0.5, -0.5)),),
    "X": (((-0.38, -0.5), (0.38, 0.5)), ((0.38, -0.5), (-0.38, 0.5))),
    "plus": (((-0.5, 0.0), (0.5, 0.0)), ((0.0, -0.5), (0.0, 0.5))),
    "triangle": (((0.0, -0.45), (0.5, 0.42), (-0.5, 0.42), (0.0, -0.45)),),
    "asterisk": (
        ((0.0, -0.5), (0.0, 0.5)),
        ((-0.43, -0.25), (0.43, 0.25)),
        ((-0.43, 0.25), (0.43, -0.25)),
    ),
    "arrow": (((-0.5, 0.0), (0.5, 0.0)), ((0.15, -0.35), (0.5, 0.0), (0.15, 0.35))),
}


def texture(
    family: int, size: int, period: float, tilt: float, phase: tuple[float, float], seed: int
) -> Floats:
    """One of the ``TEXTURES``, size×size in 0..1.

    Args:
        family: index into ``TEXTURES``.
        size: side in pixels.
        period: pixels between repetitions.
        tilt: rotation in radians; small, or horizontal stripes are no longer that.
        phase: shift (x, y) in units of the image's side; for rings their centre.
        seed: of the random textures (clouds, grain).
    """
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    columns, rows = columns - phase[0] * size, rows - phase[1] * size
    x = (np.cos(tilt) * columns + np.sin(tilt) * rows) / period
    y = (np.cos(tilt) * rows - np.sin(tilt) * columns) / period
    name = TEXTURES[family]
    if name == "horizontal stripes":
        return _bands(y)
    if name == "vertical stripes":
        return _bands(x)
    if name == "diagonal stripes":
        return _bands((x + y) / np.sqrt(2))
    if name == "checks":
        return _soft(3 * np.sin(np.pi * x) * np.sin(np.pi * y))
    if name == "dots":
        return _soft(period * (0.3 - np.hypot(x - np.round(x), y - np.round(y))))
    if name == "rings":
        return _bands(np.hypot(x, y))
    if name == "waves":
        return _bands(y + 0.35 * np.sin(np.pi * x))
    if name == "bricks":
        half = 0.5 * (np.floor(y) % 2)
        joint = np.minimum(
            np.abs(y - np.round(y)), 2 * np.abs(x / 2 + half - np.round(x / 2 + half))
        )
        return _soft(period * (joint - 0.1))
    noise = np.random.default_rng(seed)
    if name == "clouds":
        coarse, fine = _lattice_noise(noise, size, period), _lattice_noise(noise, size, period / 2)
        return _soft(3 * (coarse + 0.5 * fine - 0.75))
    grains = noise.random((size, size), dtype=np.float32)
    return ((grains + np.roll(grains, 1, 0) + np.roll(grains, 1, 1)) / 3).astype(np.float32)


def glyph_coverage(
    glyph: Floats,
    size: int,
    centre: tuple[float, float],
    height: float,
    angle: float,
    shear: float,
    weight: float,
) -> Floats:
    """How much of each pixel of a size×size image the ink of a g×g glyph covers, 0 or 1/8..1.

    The glyph is read as a smooth surface (cubic convolution) and cut at a level, which turns the
    coarse scan into a smooth pen stroke. Traces under 1/8 are no ink, so that ink always shows.

    Args:
        glyph: g×g ink in 0..1.
        size: side of the image in pixels.
        centre: (x, y) in pixels.
        height: side in pixels that the g×g glyph is drawn at.
        angle: clockwise rotation in radians.
        shear: slant, horizontal shift per unit of height.
        weight: level at which the surface is cut is 0.5 − weight: more is a thicker pen.
    """
    cells = glyph.shape[0]
    box = _box(size, centre, 0.75 * height)
    rows, columns = np.mgrid[box].astype(np.float32)
    u, v = _turn(columns - centre[0], rows - centre[1], angle)
    scale, middle = cells / height, (cells - 1) / 2
    across = _cubic((u + shear * v) * scale + middle, cells)
    down = _cubic(v * scale + middle, cells)
    surface = ((down @ glyph) * across).sum(-1)
    coverage = np.clip((surface - 0.5 + weight) / (1.6 * scale) + 0.5, 0, 1)
    image = np.zeros((size, size), np.float32)
    image[box] = np.where(coverage < 0.125, 0, coverage)
    return image


def figure_coverage(
    lines: tuple[Floats, ...],
    size: int,
    centre: tuple[float, float],
    height: float,
    angle: float,
    pen: float,
) -> Floats:
    """How much of each pixel of a size×size image a pen drawn along polylines covers, in 0..1.

    Args:
        lines: points×2 (x, y) each, in a box of side 1 around the origin.
        size: side of the image in pixels.
        centre: (x, y) in pixels.
        height: side of the box in pixels.
        angle: clockwise rotation in radians.
        pen: width of the stroke in pixels.
    """
    box = _box(size, centre, 0.75 * height + pen)
    rows, columns = np.mgrid[box].astype(np.float32)
    u, v = _turn(columns - centre[0], rows - centre[1], angle)
    points = np.stack([u, v], -1) / height
    starts = np.concatenate([line[:-1] for line in lines])
    steps = np.concatenate([np.diff(line, axis=0) for line in lines])
    offset = points[..., None, :] - starts
    along = np.clip((offset * steps).sum(-1) / (steps**2).sum(-1), 0, 1)
    distance = np.linalg.norm(offset - along[..., None] * steps, axis=-1).min(-1)
    image = np.zeros((size, size), np.float32)
    image[box] = np.clip(pen / 2 - distance * height + 0.5, 0, 1)
    return image


def blend(canvas: Floats, coverage: Floats, colour: Floats) -> Floats:
    """Lays a colour (3) over a canvas (H×W×3) where and as much as covered (H×W)."""
    return canvas + coverage[..., None] * (colour - canvas)


def _bands(turns: NDArray[np.floating[Any]]) -> Floats:
    return _soft(2 * np.sin(2 * np.pi * turns))


def _soft(signed: NDArray[np.floating[Any]]) -> Floats:
    """A soft step from 0 to 1 where the argument rises through 0."""
    step: Floats = (0.5 + 0.5 * np.tanh(signed)).astype(np.float32)
    return step


def _lattice_noise(noise: np.random.Generator, size: int, period: float) -> Floats:
    """Random values at lattice points a period apart, with cosine interpolation between."""
    points = int(np.ceil(size / period)) + 2
    values = noise.random((points, points), dtype=np.float32)
    position = np.arange(size, dtype=np.float32) / period
    left = position.astype(int)
    share = 0.5 - 0.5 * np.cos(np.pi * (position - left))
    weights = np.zeros((size, points), np.float32)
    weights[np.arange(size), left] = 1 - share
    weights[np.arange(size), left + 1] = share
    return (weights @ values @ weights.T).astype(np.float32)


def _turn(x: Floats, y: Floats, angle: float) -> tuple[Floats, Floats]:
    """Coordinates in a frame that is rotated clockwise (y points down)."""
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _box(size: int, centre: tuple[float, float], radius: float) -> tuple[slice, slice]:
    """The square around a centre, as far as it lies in the image: (rows, columns)."""
    low = [max(0, int(c - radius)) for c in centre]
    high = [min(size, int(c + radius) + 2) for c in centre]
    return slice(low[1], high[1]), slice(low[0], high[0])


def _cubic(position: Floats, cells: int) -> Floats:
    """Weights (…×cells) of cubic convolution (a = −1/2); outside the cells all is zero."""
    t = np.abs(position[..., None] - np.arange(cells, dtype=np.float32))
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0)).astype(np.float32)
