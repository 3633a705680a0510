"""Identifiability when attention to image tokens or to CLS is knocked out (Vilas et al. §4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from captum_classemb.edit import knock_out, no_cls, self_only
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.attention_perturbation.figure import draw
from captum_classemb.studies.perturbation import UNPERTURBED, PerturbationStudy
from captum_classemb.vit import record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register_study
class AttentionPerturbationStudy(PerturbationStudy):
    """How identifiable tokens stay when image tokens cannot attend to each other or to CLS.

    ``self_only`` cuts every image token off from all other image tokens, ``no_cls`` cuts image
    tokens off from CLS, in every block; each is compared with the unperturbed pass.

    Variants: ``"corrected"`` cuts before the softmax; ``"paper"`` cuts image tokens off from
    prefix tokens too in ``self_only``, does not renormalise the weights in ``no_cls``, and counts
    CLS among the image tokens in the rate of perturbed passes, as the published code does.

    Args:
        config: the model and how it is studied.

    Raises:
        UnsupportedModelError: for a model with class attention, whose image tokens attend to each
            other in blocks that the library does not read.
    """

    name = "attention-perturbation"

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config, (UNPERTURBED, "self_only", "no_cls"))
        if not self.vit.prefix_tokens:
            self.conditions = self.conditions[:2]

    def update(self, batch: Batch) -> None:
        for name in self.conditions:
            with self.edit(name, (batch.images.shape[2], batch.images.shape[3])):
                recording = record(self.vit, batch.images, ["resid_post"])
            ranks = self.ranks(recording, batch.labels)
            members = self.members(batch, ranks.shape[-1])
            self.count(name, recording.logits, batch.labels, ranks, members)

    def edit(self, name: str, size: tuple[int, int]) -> AbstractContextManager[None]:
        """The forward pass of one condition, for images of H×W pixels."""
        if name == "self_only":
            return knock_out(self.vit, self_only(self.vit, size, self.variant))
        if name == "no_cls":
            cut = no_cls(self.vit, size)
            return knock_out(self.vit, cut, renormalise=self.variant == "corrected")
        return nullcontext()

    def condition_rows(self, name: str) -> Iterator[Row]:
        rows = list(super().condition_rows(name))
        metric = f"{name}/class_identifiability_rate"
        for row in rows:
            if (row.metric, row.tokens, row.group) == (metric, "image", "all") and (
                self.variant == "paper" and name != UNPERTURBED
            ):
                counted = [row, *select(rows, metric=metric, block=row.block, tokens="cls")]
                n = sum(each.n for each in counted)
                row = row._replace(value=sum(each.value * each.n for each in counted) / n, n=n)
            yield row

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        return draw(tables[self.name])
