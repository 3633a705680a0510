"""A subset of the usual corruptions, made on the fly for any images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as transforms

from captum_classemb.data.corrupted import SEVERITIES
from captum_classemb.errors import InputError


def _noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return x + strength * torch.randn(x.shape, generator=generator).to(x)


def _blur(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    radius = max(1, round(3 * sigma))
    limit = (min(x.shape[-2:]) - 1) // 2 * 2 + 1
    blurred: Tensor = transforms.gaussian_blur(x, [min(2 * radius + 1, limit)] * 2, [sigma] * 2)
    return blurred


def _contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = x.mean((-2, -1), keepdim=True)
    return (x - mean) * factor + mean


def _brightness(x: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    return x + shift


def _jpeg(x: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = []
    for image in pixels:
        file = BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(x) / 255


def _pixelate(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    size = [max(1, round(factor * side)) for side in x.shape[-2:]]
    return interpolate(interpolate(x, size, mode="area"), x.shape[-2:], mode="nearest-exact")


_Corruption = Callable[[Tensor, float, torch.Generator], Tensor]
_TABLE: Final[Mapping[str, tuple[_Corruption, tuple[float, ...]]]] = {
    "gaussian_noise": (_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "gaussian_blur": (_blur, (0.5, 1.0, 1.5, 2.0, 3.0)),
    "contrast": (_contrast, (0.6, 0.45, 0.3, 0.2, 0.1)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg_compression": (_jpeg, (50, 25, 15, 10, 7)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}

SUBSET: Final = tuple(_TABLE)
"""Corruptions that are made on the fly. Not the released benchmark: a subset, of own strengths."""


def corrupt(images: Tensor, corruption: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images with one of :data:`SUBSET`.

    Args:
        images: B×3×H×W in 0..1, before normalisation.
        corruption: its name.
        severity: 1 to 5.
        seed: of the noise.

    Returns:
        B×3×H×W in 0..1.
    """
    if corruption not in _TABLE:
        raise InputError(
            f"No corruption {corruption!r} is made on the fly: there are {', '.join(SUBSET)}; the "
            "released folders have all 15."
        )
    if severity not in range(1, SEVERITIES + 1):
        raise InputError(f"A severity lies between 1 and {SEVERITIES}, not {severity}.")
    if bool((images < 0).any()) or bool((images > 1).any()):
        raise InputError("Corruptions take images in 0..1, before they are normalised.")
    apply, strengths = _TABLE[corruption]
    generator = torch.Generator().manual_seed(seed)
    return apply(images, strengths[severity - 1], generator).clamp(0, 1)
