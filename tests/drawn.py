"""What small tests of studies are made of: drawn images as a dataset, and a small ViT."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from captum_classemb.data import Sample

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def small_timm(**options: Any) -> nn.Module:
    """A Vision Transformer of timm of the sizes in `SMALL`, but for the options."""
    model: nn.Module = timm.models.VisionTransformer(**{**SMALL, **options})
    return model


class DrawnData:
    """Images of random pixels, one class after the other; none has a mask unless overridden."""

    layout = "drawn"
    images, side, classes = 6, 32, 4
    with_masks = 0

    @property
    def labels(self) -> list[int]:
        return [i % self.classes for i in range(self.images)]

    def __len__(self) -> int:
        return self.images

    def pixels(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, self.side, self.side, generator=generator)

    def mask(self, index: int) -> Tensor | None:
        return None

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.pixels(index), self.labels[index], self.mask(index), str(index))

    def fingerprint(self) -> str:
        return self.layout
