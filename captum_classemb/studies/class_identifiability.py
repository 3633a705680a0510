"""Class identifiability of tokens (Vilas et al. §4.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_classemb.studies.group_means import SumMetric, group_sums
from captum_classemb.studies.token_groups import GROUPS


class Identifiability(NamedTuple):
    """Each R×4, over the groups of :data:`~captum_classemb.studies.token_groups.GROUPS`.

    Attributes:
        mean: of r = 1 − rank/C over tokens.
        rate: share of tokens with r = 1.
        images: share of images with at least one token with r = 1.
        tokens: number of tokens, 4.
        images_counted: number of images with a token in the group, 4.
    """

    mean: Tensor
    rate: Tensor
    images: Tensor
    tokens: Tensor
    images_counted: Tensor


class ClassIdentifiability(SumMetric):
    """Mean and rate of class identifiability over tokens.

    Args:
        rows: R, for example blocks × sites.
        num_classes: C.

    Examples:
        >>> from captum_classemb.studies.token_groups import membership
        >>> metric = ClassIdentifiability(rows=1, num_classes=4)
        >>> metric.update(torch.tensor([[[0, 2, 0]]]), membership(1, 3, prefix_tokens=1))
        >>> metric.compute().mean[0, 1].item()
        0.75
    """

    ranks: Tensor
    best: Tensor
    found: Tensor
    tokens: Tensor
    images: Tensor

    def __init__(self, rows: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        # Sums of whole numbers: exact in float64 whatever the order of addition.
        for name in ("ranks", "best", "found"):
            zeros = torch.zeros(rows, len(GROUPS), dtype=torch.float64)
            self.add_state(name, zeros, "sum")
        for name in ("tokens", "images"):
            self.add_state(name, torch.zeros(len(GROUPS), dtype=torch.int64), "sum")

    def update(self, ranks: Tensor, members: Tensor) -> None:
        """Take in a batch.

        Args:
            ranks: number of other classes whose logit is at least the correct one's, R×B×N.
            members: 4×B×N, of :func:`~captum_classemb.studies.token_groups.membership`.
        """
        best = ranks == 0
        self.ranks += group_sums(ranks, members)
        self.best += group_sums(best, members)
        # R×G×B: whether an image has an identifiable token in the group.
        found = torch.einsum("rbn,gbn->rgb", best.float(), members.float()) > 0
        self.found += found.sum(-1)
        self.tokens += members.flatten(1).sum(1)
        self.images += members.any(-1).sum(1)

    def compute(self) -> Identifiability:
        """Means and counts; NaN where nothing is counted."""
        return Identifiability(
            1.0 - self.ranks / (self.tokens * self.num_classes),
            self.best / self.tokens,
            self.found / self.images,
            self.tokens,
            self.images,
        )


class Accuracy(SumMetric):
    """Share of images that the model itself classifies correctly."""

    correct: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("correct", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), "sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in a batch: logits B×C and correct classes B."""
        self.correct += (logits.argmax(-1) == target).sum()
        self.images += target.shape[0]

    def compute(self) -> tuple[Tensor, Tensor]:
        """The share, and the number of images."""
        return self.correct.double() / self.images, self.images
