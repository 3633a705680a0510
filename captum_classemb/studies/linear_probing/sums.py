"""What the linear-probing study adds up: tokens read correctly, fitted probes, seconds."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.studies.group_means import SumMetric
from captum_classemb.studies.token_groups import GROUPS

STAGES = ("forward", "sums", "solve", "read_probes", "read_projection")


class ReadCorrectly(SumMetric):
    """How many tokens are read correctly: by place and group of tokens, and by probe."""

    by_group: Tensor
    group_count: Tensor
    by_probe: Tensor
    probe_count: Tensor

    def __init__(self, places: int, probes: int) -> None:
        super().__init__()
        for name, size in (("group", len(GROUPS)), ("probe", probes)):
            for state in (f"by_{name}", f"{name}_count"):
                self.add_state(state, torch.zeros(places, size, dtype=torch.int64), "sum")

    def update(self, place: int, probe: int, right: Tensor, members: Tensor) -> None:
        """Take in the tokens of one probe: right B×Q, members 4×B×Q."""
        self.by_group[place] += (right & members).flatten(1).sum(1)
        self.group_count[place] += members.flatten(1).sum(1)
        self.by_probe[place, probe] += right.sum()
        self.probe_count[place, probe] += right.numel()

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shares and counts by group (P×4) and by probe (P×T)."""
        by_group, by_probe = self.by_group.double(), self.by_probe.double()
        shares = (by_group / self.group_count, by_probe / self.probe_count)
        return shares[0], self.group_count, shares[1], self.probe_count


class FittedProbes(SumMetric):
    """The probes of this pass by fold, and those of all passes on all images."""

    weight: Tensor
    bias: Tensor
    all_weight: Tensor
    all_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "all_weight", "all_bias"):
            self.add_state(name, torch.zeros(0))

    def update(self) -> None:
        """Not used: the study sets the states itself."""

    def compute(self) -> None:
        """Not used: the study reads the states itself."""


class Seconds(SumMetric):
    """How long each stage took, all processes together."""

    spent: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("spent", torch.zeros(len(STAGES), dtype=torch.float64), "sum")

    def update(self, stage: str, seconds: float) -> None:
        """Add to one stage."""
        self.spent[STAGES.index(stage)] += seconds

    def compute(self) -> dict[str, float]:
        """By stage."""
        return dict(zip(STAGES, (round(s, 3) for s in self.spent.tolist()), strict=True))
