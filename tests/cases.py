"""Every family once: a small model, images, the oracle's account, and the package's reading."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from families import NOT_FOLLOWED, WITHOUT_LEDGER, build, images
from oracle import Oracle
from torch import Tensor, nn

from captum_classemb.vit import ViT, adapt


@dataclass(frozen=True)
class Case:
    """A small model with random images and what the oracle says of them; none may be changed."""

    name: str
    model: nn.Module
    images: Tensor
    oracle: Oracle

    @property
    def target(self) -> Tensor:
        """A class for each image."""
        return torch.arange(len(self.images)) * 3 + 1

    @property
    def affine(self) -> bool:
        """Whether the readout is an affine map once its norms are frozen."""
        return self.name not in WITHOUT_LEDGER

    @property
    def followed(self) -> bool:
        """Whether a score can be followed back along the rows that are read out."""
        return self.name not in NOT_FOLLOWED

    @cached_property
    def vit(self) -> ViT:
        """The model, adapted."""
        return adapt(self.model)

    @cached_property
    def single(self) -> ViT:
        """The same weights in float32, adapted."""
        return adapt(build(self.name, torch.float32))


@cache
def case(name: str) -> Case:
    """The family's case in float64, built once."""
    model, pixels = build(name), images(name)
    return Case(name, model, pixels, Oracle(model, pixels))
