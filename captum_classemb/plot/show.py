"""Any image with any maps over it, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from PIL import Image

from captum_classemb.data.images import as_rgb, read_image
from captum_classemb.errors import InputError
from captum_classemb.plot.maps import Floats, bare, blend, color_scale, overlay_map

__all__ = ["show"]


def show(
    image: Any,
    maps: Any,
    *,
    output: Literal["axes", "image", "array"] = "axes",
    smooth: bool = False,
    label: str = "score",
) -> Any:
    """Lay maps over the image that they explain.

    Maps that are shown together share one scale, symmetric about 0 if a score is negative; one
    patch in a hundred may lie beyond it. The image stands beside them, and a colour bar.

    Args:
        image: a path, a PIL image, an array H×W×3 (8 bits, or numbers from 0 to 1) or a tensor
            3×H×W of numbers from 0 to 1. It is brought to no other size.
        maps: patch scores h×w, attributions of pixels 1×3×H×W, 3×H×W or H×W, of which channels are
            summed; or a mapping from titles to these, drawn side by side.
        output: ``"axes"`` draws, ``"image"`` is the overlay as a PIL image, ``"array"`` as 8 bits
            H×W×3; the last two take one map.
        smooth: interpolate between the centres of patches.
        label: of the colour bar: what the scores are.

    Returns:
        the axes as an array, that of the image first; a PIL image; or an array.

    Raises:
        InputError: if the image or a map cannot be read as one, or several maps are to be one
            image.
        NonFiniteError: if a score is NaN or infinite.

    Examples:
        >>> import numpy as np
        >>> photograph = np.zeros((32, 32, 3), np.uint8)
        >>> show(photograph, torch.randn(4, 4), output="array").shape
        (32, 32, 3)
    """
    if output not in ("axes", "image", "array"):
        raise InputError(f"output {output!r} is none of 'axes', 'image', 'array'.")
    pixels = _pixels(image)
    named = dict(maps) if isinstance(maps, Mapping) else {"": maps}
    if not named:
        raise InputError("no map was given.")
    values = {title: _scores(each) for title, each in named.items()}
    scale = color_scale(np.concatenate([each.ravel() for each in values.values()])[None])
    if output != "axes":
        if len(values) > 1:
            raise InputError(f"{len(values)} maps were given: one image shows one.")
        (only,) = values.values()
        overlay = (255 * blend(pixels, only, scale, smooth)).round().astype(np.uint8)
        return overlay if output == "array" else Image.fromarray(overlay)
    return _drawn(pixels, values, scale, smooth, label)


def _drawn(
    pixels: npt.NDArray[np.uint8],
    values: Mapping[str, Floats],
    scale: Any,
    smooth: bool,
    label: str,
) -> npt.NDArray[Any]:
    width = 2.6 * pixels.shape[1] / max(pixels.shape[:2])
    height = 2.6 * pixels.shape[0] / max(pixels.shape[:2])
    columns = 1 + len(values)
    figure, axes = plt.subplots(
        1, columns, figsize=(columns * width + 0.8, height + 0.35), layout="constrained"
    )
    axes[0].imshow(pixels)
    bare(axes[0])
    for ax, (title, each) in zip(axes[1:], values.items(), strict=True):
        overlay_map(ax, pixels, each, smooth=smooth, scale=scale)
        ax.set_title(title, fontsize=9, loc="left", parse_math=False)
    _bar(axes, scale, values, label)
    return np.asarray(axes)


def _bar(axes: npt.NDArray[Any], scale: Any, values: Mapping[str, Floats], label: str) -> None:
    colors, norm = scale
    above = any(each.max() > norm.vmax for each in values.values())
    below = any(each.min() < norm.vmin for each in values.values())
    extend = {(True, True): "both", (True, False): "max", (False, True): "min"}
    last: Axes = axes[-1]
    bar = last.figure.colorbar(
        ScalarMappable(norm, colors),
        ax=list(axes),
        extend=extend.get((above, below), "neither"),
        fraction=0.03,
        pad=0.015,
        aspect=24,
    )
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=5)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7.5, length=2, width=0.6)


def _pixels(image: Any) -> npt.NDArray[np.uint8]:
    """H×W×3, 8 bits."""
    if isinstance(image, (str, Path)):
        return np.asarray(read_image(image))
    if isinstance(image, Image.Image):
        return np.asarray(as_rgb(image))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().float().squeeze(0) if image.dim() == 4 else image.cpu()
        image = image.movedim(0, -1).numpy() if image.dim() == 3 else image
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise InputError(
            f"the image has shape {tuple(array.shape)}: H×W×3 is needed, or a tensor 3×H×W."
        )
    if array.dtype == np.uint8:
        return array
    if not np.isfinite(array).all() or array.min() < 0.0 or array.max() > 1.0:
        raise InputError(
            "the image's numbers are not between 0 and 1: give it before normalisation, or as a "
            "path."
        )
    return (255 * array).round().astype(np.uint8)


def _scores(values: Any) -> Floats:
    """One map: h×w."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and len(array) in (1, 3):
        array = array.sum(0)
    if array.ndim != 2:
        raise InputError(
            f"a map has shape {array.shape}: h×w patches or attributions of one image are needed."
        )
    return array
