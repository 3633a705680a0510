"""The difference between class and context tokens, and how likely chance gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_classemb.functional.permutation import (
    EXACT_BELOW,
    all_signs,
    count_hits,
    random_signs,
)
from captum_classemb.studies.group_means import SumMetric

#: Differences this close are equal: they differ by the order of addition alone.
_TIE = 1e-12


class Difference(NamedTuple):
    """Class tokens against context tokens.

    Attributes:
        value: the difference, R: that of the means.
        means: of class and of context tokens, 2×R.
        p: how likely chance gives it, R.
        n: number of images, or of tokens, that are compared.
    """

    value: Tensor
    means: Tensor
    p: Tensor
    n: int


class ClassContextDifference(SumMetric):
    """Class against context tokens with the image as the unit.

    An image's value is the mean over its tokens of a kind; p is two-sided, by flipping the signs of
    the images' differences. The sums of all random sign assignments are kept, not the differences,
    so memory does not grow with the images; signs depend on the seed and the image's index alone,
    so results do not depend on batches or processes.

    Args:
        rows: R quantities.
        scale, shift: the tokens' values x stand for shift + scale · x.
        draws: random sign assignments from 13 images on; fewer images are tested exactly.
        seed: of these.
    """

    sums: Tensor
    total: Tensor
    absolute: Tensor
    drawn: Tensor
    images: Tensor
    first: Tensor

    def __init__(
        self,
        rows: int,
        scale: float = 1.0,
        shift: float = 0.0,
        draws: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.draws, self.seed = draws, seed
        zeros = torch.zeros(rows, dtype=torch.float64)
        self.add_state("sums", torch.stack([zeros, zeros]), "sum")
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
        means = self.shift + self.scale * means
        difference = (means[0] - means[1])[:, both]
        chosen = [i for i, keep in zip(indices, both.tolist(), strict=True) if keep]
        signs = random_signs(chosen, self.draws, self.seed).to(difference.device)
        self.sums += means[..., both].sum(-1)
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
            return Difference(nothing, self.sums / 0.0, nothing, 0)
        if count < EXACT_BELOW:
            first = self.first[:count]
            drawn = first.T @ all_signs(count).to(first)
            hits = count_hits(drawn, first.sum(0), first.abs().sum(0))
            return self._found(hits.double() / drawn.shape[1], count)
        hits = count_hits(self.drawn, self.total, self.absolute)
        return self._found((1 + hits.double()) / (1 + self.draws), count)

    def _found(self, p: Tensor, count: int) -> Difference:
        return Difference(self.total / count, self.sums / count, p, count)


class ShuffledTokens(SumMetric):
    """Class against context tokens as the published code compares them: the token is the unit.

    The value is the mean over all class tokens minus that over all context tokens, and p the share
    of 300 shuffles of all these tokens that give a larger one. Counts of the values are kept, of
    which a shuffle draws without replacement.

    Args:
        rows: R quantities.
        levels: their values are 0 … levels − 1.
        scale, shift: what stands for a level is shift + scale · level.
        seed: of the shuffles.
    """

    counts: Tensor
    draws = 300

    def __init__(
        self, rows: int, levels: int, scale: float = 1.0, shift: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.seed = seed
        self.values = shift + scale * torch.arange(levels, dtype=torch.float64)
        self.add_state("counts", torch.zeros(2, rows, levels, dtype=torch.int64), "sum")

    def update(self, levels: Tensor, members: Tensor, indices: Sequence[int]) -> None:
        """Take in a batch.

        Args:
            levels: whole numbers or bool, R×B×N.
            members: 4×B×N, of :func:`~captum_classemb.studies.token_groups.membership`.
            indices: places of the images in the dataset, B.
        """
        rows, number = self.counts.shape[1:]
        start = number * torch.arange(rows, device=levels.device)[:, None]
        for group, of in enumerate(members[2:4]):
            places = (levels[:, of].long() + start).flatten()
            self.counts[group] += torch.bincount(places, minlength=rows * number).view(rows, -1)

    def compute(self) -> Difference:
        """Difference, means, p-value and number of tokens; NaN without tokens of both kinds."""
        counts, values = self.counts.cpu(), self.values
        n = counts.sum(-1)[:, :1].double()
        means = counts.double() @ values / n
        p = torch.full_like(means[0], torch.nan)
        if bool((n > 0).all()):
            generator = np.random.Generator(np.random.Philox(self.seed))
            for row, (ours, others) in enumerate(counts.transpose(0, 1)):
                both = ours + others
                some = both > 0
                drawn = generator.multivariate_hypergeometric(
                    both[some].numpy(), int(ours.sum()), size=self.draws, method="marginals"
                )
                sums = torch.from_numpy(drawn).double() @ values[some]
                rest = float(both.double() @ values) - sums
                larger = sums / n[0] - rest / n[1] > means[0, row] - means[1, row] + _TIE
                p[row] = larger.double().mean()
        return Difference(means[0] - means[1], means, p, int(n.sum()))


def _keep_first(parts: Sequence[Tensor] | Tensor) -> Tensor:
    """The first rows that are not NaN, as many as an exact test can use."""
    rows = torch.cat(list(parts))
    rows = rows[~rows.isnan().any(1)][: EXACT_BELOW - 1]
    missing = EXACT_BELOW - 1 - rows.shape[0]
    return torch.nn.functional.pad(rows, (0, 0, 0, missing), value=torch.nan)
