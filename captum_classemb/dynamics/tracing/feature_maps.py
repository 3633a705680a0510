"""What a module put out, as feature maps B×C×h×w: layouts, grids and prefix tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, sqrt

from torch import Tensor, nn

# More prefix tokens than any family has; a search bound where the model names no number.
_MOST_PREFIX_TOKENS = 16


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and give each its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model that ``DataParallel`` or ``DistributedDataParallel`` wraps, or the model itself."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = model.module
        return inner
    return model


def layout_of(model: nn.Module) -> tuple[int | None, bool]:
    """The number of prefix tokens that the model declares, and whether its channels come last."""
    prefix: int | None = None
    channels_last = False
    for module in (model, getattr(model, "model", None)):
        if prefix is None and isinstance(getattr(module, "num_prefix_tokens", None), int):
            prefix = int(module.num_prefix_tokens)  # type: ignore[union-attr, arg-type]
        channels_last |= getattr(module, "output_fmt", "") == "NHWC"
    return prefix, channels_last


def _misfit(h: int, w: int, image_size: tuple[int, int]) -> float:
    """How many rows h×w is from the image subsampled by one factor; inf for no grid at all."""
    height, width = image_size
    if h < 2 or w < 2 or h > height or w > width or (height == width and h != w):
        return inf
    # Borders are rounded to whole cells.
    rows = abs(h - w * height / width)
    return rows if rows <= 1 else inf


def _token_grid(
    tokens: int, image_size: tuple[int, int], prefix: int | None
) -> tuple[int, int, int] | None:
    """Prefix tokens, h, w of a sequence of so many tokens."""
    guesses = [] if prefix is None else [prefix]
    for p in dict.fromkeys([*guesses, *range(_MOST_PREFIX_TOKENS + 1)]):
        area = tokens - p
        if area < 4:
            continue
        h = round(sqrt(area * image_size[0] / image_size[1]))
        if h and area % h == 0 and _misfit(h, area // h, image_size) < inf:
            return p, h, area // h
    return None


def _tensor_as_map(
    x: Tensor, image_size: tuple[int, int], prefix: int | None, channels_last: bool
) -> Tensor | None:
    if x.dim() == 4:
        first = _misfit(x.shape[2], x.shape[3], image_size)
        last = _misfit(x.shape[1], x.shape[2], image_size)
        if last < first or (channels_last and last == first):
            return x.permute(0, 3, 1, 2)
        return x if first < inf else None
    if x.dim() == 3 and (found := _token_grid(x.shape[1], image_size, prefix)):
        p, h, w = found
        patches = x[:, p:].transpose(1, 2)
        return patches.reshape(*patches.shape[:2], h, w)
    return None


def as_feature_map(
    value: object,
    batch: int,
    image_size: tuple[int, int],
    prefix: int | None = None,
    channels_last: bool = False,
) -> Tensor | None:
    """Read a module's output or input as feature maps.

    Args:
        value: a tensor, or a tuple or list of which the first fitting tensor is taken.
        batch: B.
        image_size: H, W of the images that went in; a grid has their aspect ratio.
        prefix: number of prefix tokens, if known; else the smallest number that leaves a grid.
        channels_last: what B×a×b×c is where both B×h×w×C and B×C×h×w would fit.

    Returns:
        B×C×h×w, a view without prefix tokens; None where ``value`` holds no spatial features.

    Examples:
        >>> import torch
        >>> as_feature_map(torch.zeros(2, 17, 8), 2, (32, 32)).shape
        torch.Size([2, 8, 4, 4])
        >>> as_feature_map(torch.zeros(2, 4, 4, 8), 2, (32, 32)).shape
        torch.Size([2, 8, 4, 4])
        >>> as_feature_map(torch.zeros(2, 10), 2, (32, 32)) is None
        True
    """
    candidates = value if isinstance(value, (tuple, list)) else [value]
    for x in candidates:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and x.shape[0] == batch:
            found = _tensor_as_map(x, image_size, prefix, channels_last)
            if found is not None:
                return found
    return None
