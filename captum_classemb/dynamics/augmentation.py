"""Random shifts and mirror images: losses and Hessians are those of augmented training images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from captum_classemb.errors import InputError


def augment(
    images: Tensor, generator: torch.Generator, *, shift: int | None = None, flip: bool = False
) -> Tensor:
    """Shift every image by up to so many pixels, and mirror half of them.

    Args:
        images: B×3×H×W, normalised or not; borders are continued by reflection.
        generator: a CPU generator; the same one gives the same images on any device.
        shift: pixels; None takes an eighth of the shorter side, 4 of 32.
        flip: mirror each image with probability ½.

    Returns:
        B×3×H×W.

    Raises:
        InputError: the shift is negative or not smaller than a side.

    Examples:
        >>> augment(torch.ones(2, 3, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """
    height, width = images.shape[-2:]
    most = min(height, width) // 8 if shift is None else shift
    if not 0 <= most < min(height, width):
        raise InputError(f"Images of {height}×{width} cannot be shifted by {most} pixels.")
    padded = pad(images, (most,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * most + 1, (len(images), 2), generator=generator).tolist()
    shifted = torch.stack(
        [
            image[:, y : y + height, x : x + width]
            for image, (y, x) in zip(padded, offsets, strict=True)
        ]
    )
    if not flip:
        return shifted
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], shifted.flip(-1), shifted)
