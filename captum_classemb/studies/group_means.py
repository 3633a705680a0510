"""Sums over the tokens of each group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

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
