"""A small ViT and images whose object is the left half, for the studies of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from drawn import DrawnData, small_timm
from torch import nn

from captum_classemb.data import StudyDataset
from captum_classemb.runs import Row, RunOptions, select

QUIET = RunOptions(batch_size=4, progress=False)
IMAGES, SIDE, DEPTH, CLASSES = 15, 32, 3, 12


class Squares(DrawnData):
    """Random images; the object is the left half of each, one has no mask."""

    layout = "squares"
    images, side, classes = IMAGES, SIDE, CLASSES
    with_masks = IMAGES - 1

    def mask(self, index: int) -> torch.Tensor | None:
        mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        mask[:, : SIDE // 2] = 1
        return None if index == 2 else mask


def small_vit(**changes: object) -> nn.Module:
    torch.manual_seed(1)
    model: Any = small_timm(**{"depth": DEPTH, "num_classes": CLASSES, **changes})
    for block in model.blocks:
        # As initialised, blocks add so little that every token keeps its class.
        nn.init.normal_(block.attn.proj.weight, std=0.3)
        nn.init.normal_(block.mlp.fc2.weight, std=0.3)
    nn.init.normal_(model.head.weight)
    return model.eval()


def whole(data: StudyDataset) -> tuple[torch.Tensor, torch.Tensor]:
    samples = [data[i] for i in range(len(data))]
    return torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples])


def one(rows: Sequence[Row], **fields: object) -> float:
    """The value of the only row with these fields."""
    (row,) = select(rows, **fields)
    return row.value
