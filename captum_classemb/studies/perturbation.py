"""The base class of studies that compare perturbed forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.edit.tokens import refuse_class_attention
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.class_identifiability import Accuracy, ClassIdentifiability
from captum_classemb.studies.model_study import ModelStudy
from captum_classemb.vit import Recording

UNPERTURBED = "unperturbed"


class PerturbationStudy(ModelStudy):
    """Identifiability after every block, and accuracy, under several conditions.

    Metrics are called ``CONDITION/METRIC`` in tables.

    Args:
        config: the model and how it is studied.
        conditions: their names, the unperturbed one first.

    Raises:
        UnsupportedModelError: for a model with class attention.
    """

    def __init__(self, config: StudyConfig, conditions: Sequence[str]) -> None:
        super().__init__(config)
        refuse_class_attention(self.vit)
        self.conditions = tuple(conditions)
        self.depth = len(self.vit.blocks)
        self.places = [(block, "resid_post") for block in range(self.depth)]
        self.metrics = nn.ModuleDict()
        for name in self.conditions:
            self.metrics[f"{name}/accuracy"] = Accuracy()
            classes = self.readout.num_classes
            self.metrics[f"{name}/tokens"] = ClassIdentifiability(self.depth, classes)

    def ranks(self, recording: Recording, target: Tensor) -> Tensor:
        """Rank of the target after every block, L×B×N."""
        found = [
            self.reader(block, site).scores(recording[site][block], target, top=0).rank
            for block, site in self.places
        ]
        return torch.stack(found)

    def count(self, name: str, logits: Tensor, target: Tensor, ranks: Tensor, of: Tensor) -> None:
        """Take in a pass: logits B×C, targets B, ranks L×B×N of the tokens ``of`` 4×B×N."""
        accuracy: Any = self.metrics[f"{name}/accuracy"]
        tokens: Any = self.metrics[f"{name}/tokens"]
        accuracy.update(logits, target)
        tokens.update(ranks, of)

    def condition_rows(self, name: str) -> Iterator[Row]:
        """The rows of one pass."""
        accuracy: Any = self.metrics[f"{name}/accuracy"]
        tokens: Any = self.metrics[f"{name}/tokens"]
        value, images = accuracy.compute()
        yield self.row(f"{name}/accuracy", value, images, (-1, ""))
        yield from self.identifiability_rows(tokens.compute(), self.places, f"{name}/")

    def tables(self) -> dict[str, list[Row]]:
        return {self.name: [row for name in self.conditions for row in self.condition_rows(name)]}

    def headline(self, tables: dict[str, list[Row]]) -> Sequence[Row]:
        rows = tables[self.name]
        chosen = [row for row in rows if row.metric.endswith("/accuracy")]
        for name in self.conditions:
            last = select(rows, metric=f"{name}/class_identifiability_rate", block=self.depth - 1)
            chosen += [row for row in last if row.tokens == "image"]
        return chosen
