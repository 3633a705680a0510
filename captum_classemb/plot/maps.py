"""A map of patch scores laid over the image it belongs to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from torch.nn import functional as F

from captum_classemb.errors import InputError, NonFiniteError

Floats = npt.NDArray[np.floating]
Scale = tuple[LinearSegmentedColormap, Normalize]


def _srgb(oklab: Floats) -> Floats:
    """OKLab (…×3) to sRGB in 0–1; source: B. Ottosson, "A perceptual color space" (2020)."""
    to_lms = np.array(
        [
            [1.0, 0.3963377774, 0.2158037573],
            [1.0, -0.1055613458, -0.0638541728],
            [1.0, -0.0894841775, -1.2914855480],
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((oklab @ to_lms.T) ** 3) @ to_rgb.T
    linear = np.clip(linear, 0.0, 1.0)
    encoded = 1.055 * linear ** (1 / 2.4) - 0.055
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, encoded))


def _arm(end: tuple[float, float, float], steps: int) -> Floats:
    """Colours from near white to `end` (OKLab lightness, chroma, hue in degrees) at even steps."""
    lightness, chroma, hue = end
    angle = np.deg2rad(hue)
    target = np.array([lightness, chroma * np.cos(angle), chroma * np.sin(angle)])
    share = np.linspace(0.0, 1.0, steps)[:, None]
    return _srgb((1 - share) * np.array([0.975, 0.0, 0.0]) + share * target)


# Straight lines through OKLab: equal steps of a score look equally large, both arms are equally
# dark, and blue against orange-red stays apart for every common colour blindness.
_AGAINST = _arm((0.48, 0.168, 262.0), 129)
_FOR = _arm((0.48, 0.168, 35.0), 129)

DIVERGING = LinearSegmentedColormap.from_list(
    "classemb_diverging", np.concatenate([_AGAINST[:0:-1], _FOR]), N=257
)
SEQUENTIAL = LinearSegmentedColormap.from_list("classemb_sequential", _FOR, N=257)

# The share of patches that a scale may clip: single patches can outshine all others.
_CLIPPED = 0.01


def color_scale(values: npt.ArrayLike) -> tuple[LinearSegmentedColormap, Normalize]:
    """The colours for maps: diverging and symmetric about 0, or sequential if nothing is negative.

    Args:
        values: h×w, or …×h×w for maps that are to be compared with each other.

    Returns:
        A colour map and the range it covers; one patch in a hundred may lie beyond the range.

    Raises:
        NonFiniteError: if a value is NaN or infinite.
    """
    scores = _finite(
        np.reshape(values, (-1, np.shape(values)[-1])) if np.ndim(values) > 2 else values
    )
    limit = float(np.quantile(np.abs(scores), 1 - _CLIPPED))
    limit = limit or float(np.abs(scores).max()) or 1.0
    if scores.min() < 0:
        return DIVERGING, Normalize(-limit, limit, clip=True)
    return SEQUENTIAL, Normalize(0.0, limit, clip=True)


def upsample(values: npt.ArrayLike, image_size: tuple[int, int], smooth: bool = True) -> Floats:
    """Bring a patch map to the size of the image, every patch staying where it is.

    Args:
        values: h×w; the patches cover the image and are of one size.
        image_size: H, W.
        smooth: interpolate linearly between the centres of the patches, so that no score appears
            that lies outside the range of its neighbours; else repeat each score over its patch.

    Returns:
        H×W, float64.

    Raises:
        InputError: if `values` is no map, or finer than the image.
        NonFiniteError: if a value is NaN or infinite.
    """
    scores = _finite(values)
    (h, w), (height, width) = scores.shape, image_size
    if h > height or w > width:
        raise InputError(f"A map of {h}×{w} patches does not fit an image of {height}×{width}.")
    patches = torch.from_numpy(scores)[None, None]
    if smooth:
        pixels = F.interpolate(patches, image_size, mode="bilinear", align_corners=False)
    else:
        pixels = F.interpolate(patches, image_size, mode="nearest-exact")
    return pixels[0, 0].numpy()


def overlay_map(
    ax: Axes,
    image: npt.NDArray[np.uint8],
    values: npt.ArrayLike,
    *,
    smooth: bool = True,
    scale: Scale | None = None,
) -> ScalarMappable:
    """Print a map over its image, which shows through in gray.

    Args:
        ax: where to draw.
        image: H×W×3, 8 bits.
        values: h×w, row by row from the upper left.
        smooth: see `upsample`.
        scale: colours and their range, where several maps share them; see `color_scale`.

    Returns:
        The colours and their range, for a colour bar.

    Raises:
        InputError: if `values` is no map, or finer than the image.
        NonFiniteError: if a value is NaN or infinite.
    """
    colors, norm = scale or color_scale(values)
    printed = blend(image, values, (colors, norm), smooth)
    ax.imshow(printed, interpolation="bicubic" if smooth else "nearest")
    bare(ax)
    return ScalarMappable(norm, colors)


def blend(
    image: npt.NDArray[np.uint8], values: npt.ArrayLike, scale: Scale, smooth: bool
) -> Floats:
    """A map printed over its image in gray: H×W×3 in 0–1."""
    colors, norm = scale
    pixels = upsample(values, image.shape[:2], smooth)
    gray = (image / 255.0) @ np.array([0.2126, 0.7152, 0.0722])
    # Stretched and lightened, so that even in a dark photograph the colours can be told apart.
    low, high = np.quantile(gray, (0.02, 0.98))
    paper = 0.66 + 0.34 * np.clip((gray - low) / max(high - low, 1e-6), 0.0, 1.0)[..., None]
    return np.asarray(colors(norm(pixels))[..., :3] * paper)


def bare(ax: Axes) -> None:
    """Take ticks and frame off an axes that shows an image."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _finite(values: npt.ArrayLike) -> Floats:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise InputError(f"A map has h×w patches, not the shape {scores.shape}.")
    if not np.isfinite(scores).all():
        raise NonFiniteError("The map holds NaN or infinity: finite scores are needed.")
    return scores
