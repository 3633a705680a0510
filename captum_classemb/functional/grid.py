"""From scores of patches to scores of pixels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PatchSize = tuple[int, int]


def _cells(length: int, cells: int, size: int | None, device: torch.device) -> Tensor:
    """The cell of each pixel of one axis; a padded image's last cell covers fewer pixels."""
    size = -(-length // cells) if size is None else size
    # Pixels beyond the last whole patch, which some embeddings leave out, go with their neighbours.
    return (torch.arange(length, device=device) // size).clamp_max(cells - 1)


def patch_index(
    image_size: tuple[int, int], grid: tuple[int, int], patch_size: PatchSize | None = None
) -> Tensor:
    """The patch that each pixel belongs to, counted row by row: H×W, int64.

    Args:
        image_size: H, W.
        grid: h, w.
        patch_size: pixels of a patch; needed where the patches do not fill the image exactly.

    Examples:
        >>> patch_index((2, 4), (1, 2))
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1]])
    """
    height, width = patch_size or (None, None)
    device = torch.device("cpu")
    rows = _cells(image_size[0], grid[0], height, device)
    columns = _cells(image_size[1], grid[1], width, device)
    return rows[:, None] * grid[1] + columns


def tile(
    patches: Tensor, image_size: tuple[int, int], patch_size: PatchSize | None = None
) -> Tensor:
    """Repeat each patch's score over its pixels, …×h×w to …×H×W; see :func:`patch_index`."""
    height, width = patch_size or (None, None)
    rows = _cells(image_size[0], patches.shape[-2], height, patches.device)
    columns = _cells(image_size[1], patches.shape[-1], width, patches.device)
    return patches.index_select(-2, rows).index_select(-1, columns)


def spread(
    patches: Tensor,
    image_size: tuple[int, int],
    channels: int,
    patch_size: PatchSize | None = None,
) -> Tensor:
    """Share each patch's score evenly among its pixels and channels, so that sums are kept.

    Args:
        patches: B×h×w.
        image_size: H, W of the image.
        channels: number of image channels.
        patch_size: as in :func:`patch_index`.

    Returns:
        B×channels×H×W.

    Examples:
        >>> spread(torch.ones(1, 1, 1), (2, 2), 1)
        tensor([[[[0.2500, 0.2500],
                  [0.2500, 0.2500]]]])
    """
    h, w = patches.shape[-2:]
    index, counts = _pixels(image_size, (h, w), channels, patch_size, patches.device, patches.dtype)
    shared = (patches.flatten(-2) / counts).index_select(-1, index)
    pixels: Tensor = shared.unflatten(-1, image_size)[:, None].repeat(1, channels, 1, 1)
    return pixels


@lru_cache(maxsize=32)
def _pixels(
    image_size: tuple[int, int],
    grid: tuple[int, int],
    channels: int,
    patch_size: PatchSize | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The patch of each pixel, and the values each patch shares its score among; made once."""
    height, width = patch_size or (None, None)
    with torch.inference_mode(False):
        rows = _cells(image_size[0], grid[0], height, device)
        columns = _cells(image_size[1], grid[1], width, device)
        index = (rows[:, None] * grid[1] + columns).flatten()
        # Counted by axis: the shape of a count by value would depend on the values.
        high, wide = (
            (cells == torch.arange(n, device=device)[:, None]).sum(1)
            for cells, n in zip((rows, columns), grid, strict=True)
        )
        counts = (high[:, None] * wide).flatten() * channels
        return index, counts.to(dtype)
