"""Sums over the tokens of each group, and the difference between class and context tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_classemb.functional.permutation import (
    EXACT_BELOW,
    all_signs,
    count_hits,
    random_signs,
)
from captum_classemb.studies.token_groups import GROUPS


def group_sums(values: Tensor, members: Tensor) -> Tensor:
    """Sum the values of each group's tokens.

    Args:
        values: R×B×N.
        members: bool, G×B×N.

    Returns:
        float64, R×G.
    """
    return values.flatten(1).double() @ members.flatten(1).double().T


class Means(NamedTuple):
    """Means of R quantities over the tokens of each of ``token_groups.GROUPS``.

    Attributes:
        value: float64, R×4; NaN where no token is counted.
        n: number of tokens, int64, 4.
    """

    value: Tensor
    n: Tensor


class SumMetric(Metric):
    """A metric of sums alone: it merges by addition and goes on from a saved state."""

    full_state_update = False

    @property
    def update_called(self) -> bool:
        """Always True: a loaded state counts, and nothing counted is a result (NaN, n = 0)."""
        return True


class GroupedMean(SumMetric):
    """The mean of R token-wise quantities over each group of tokens.

    Args:
        rows: R.

    Examples:
        >>> from captum_classemb.studies.token_groups import membership
        >>> metric = GroupedMean(rows=1)
        >>> metric.update(torch.tensor([[[1.0, 0.0, 1.0]]]), membership(1, 3, prefix_tokens=1))
        >>> metric.compute().value[0, :2].tolist()
        [1.0, 0.5]
    """

    total: Tensor
    count: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        groups = len(GROUPS)
        self.add_state("total", torch.zeros(rows, groups, dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros(groups, dtype=torch.int64), "sum")

    def update(self, values: Tensor, members: Tensor) -> None:
        """Take in a batch.

        Args:
            values: R×B×N, numbers or bool.
            members: 4×B×N, of :func:`~captum_classemb.studies.token_groups.membership`.
        """
        self.total += group_sums(values, members)
        self.count += members.flatten(1).sum(1)

    def compute(self) -> Means:
        """The means and the number of tokens."""
        return Means(self.total / self.count, self.count)


class Difference(NamedTuple):
    """Class tokens against context tokens, with the image as the unit.

    Attributes:
        value: mean over images of (mean over class tokens − mean over context tokens), R.
        p: two-sided, by flipping the signs of the images' differences, R.
        n: number of images that have tokens of both kinds.
    """

    value: Tensor
    p: Tensor
    n: int


class ClassContextDifference(SumMetric):
    """The difference between class and context tokens and how likely chance gives it.

    The sums of all random sign assignments are kept, not the images' differences, so memory does
    not grow with the images; signs depend on the seed and the image's index alone, so results do
    not depend on batches or processes.

    Args:
        rows: R quantities.
        draws: random sign assignments from 13 images on; fewer images are tested exactly.
        seed: of these.
    """

    total: Tensor
    absolute: Tensor
    drawn: Tensor
    images: Tensor
    first: Tensor

    def __init__(self, rows: int, draws: int = 10_000, seed: int = 0) -> None:
        super().__init__()
        self.draws, self.seed = draws, seed
        zeros = torch.zeros(rows, dtype=torch.float64)
        self.add_state("total", zeros.clone(), "sum")
        self.add_state("absolute", zeros.clone(), "sum")
        self.add_state("drawn", torch.zeros(rows, draws, dtype=torch.float64), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), "sum")
        # The differences themselves, as long as an exact test may need them; empty rows are NaN.
        first = torch.full((EXACT_BELOW - 1, rows), torch.nan, dtype=torch.float64)
        self.add_state("first", first, _keep_first)

    def update(self, values: Tensor, members: Tensor, indices: Sequence[int]) -> None:
        """Take in a batch.

        Args:
            values: R×B×N.
            members: 4×B×N, of :func:`~captum_classemb.studies.token_groups.membership`.
            indices: places of the images in the dataset, B.
        """
        halves = members[2:4].double()
        counts = halves.sum(-1)
        both = (counts > 0).all(0)
        means = torch.einsum("rbn,gbn->grb", values.double(), halves) / counts[:, None]
        difference = (means[0] - means[1])[:, both]
        chosen = [i for i, keep in zip(indices, both.tolist(), strict=True) if keep]
        signs = random_signs(chosen, self.draws, self.seed).to(difference.device)
        self.total += difference.sum(1)
        self.absolute += difference.abs().sum(1)
        self.drawn += difference @ signs.double()
        self.images += len(chosen)
        self.first = _keep_first([self.first, difference.T])

    def compute(self) -> Difference:
        """Mean difference, p-value and number of images; NaN without images."""
        count = int(self.images)
        if count == 0:
            nothing = torch.full_like(self.total, torch.nan)
            return Difference(nothing, nothing, 0)
        if count < EXACT_BELOW:
            first = self.first[:count]
            drawn = first.T @ all_signs(count).to(first)
            hits = count_hits(drawn, first.sum(0), first.abs().sum(0))
            return Difference(self.total / count, hits.double() / drawn.shape[1], count)
        hits = count_hits(self.drawn, self.total, self.absolute)
        return Difference(self.total / count, (1 + hits.double()) / (1 + self.draws), count)


def _keep_first(parts: Sequence[Tensor] | Tensor) -> Tensor:
    """The first rows that are not NaN, as many as an exact test can use."""
    rows = torch.cat(list(parts))
    rows = rows[~rows.isnan().any(1)][: EXACT_BELOW - 1]
    missing = EXACT_BELOW - 1 - rows.shape[0]
    return torch.nn.functional.pad(rows, (0, 0, 0, missing), value=torch.nan)
