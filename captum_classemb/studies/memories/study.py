"""Attention and MLP layers as memories of classes: agreement and compositionality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_classemb.functional.variant import Variant
from captum_classemb.readout import Scale, Step
from captum_classemb.readout.vectors import VectorClasses, read_vectors
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.group_means import GroupedMean
from captum_classemb.studies.memories.metric import (
    ClassValueAgreement,
    KeyValueAgreement,
    MemoryCompositionality,
    random_classes,
)
from captum_classemb.studies.model_study import ModelStudy
from captum_classemb.vit import ViT, adapt, record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = ("attn", "mlp")
_STRONGEST = 5


def _value_vectors(vit: ViT, layer: str, block: int, variant: Variant) -> Tensor:
    """Value vectors as rows, M×D: as they are added, with LayerScale; ``"paper"`` without."""
    parts = vit.blocks[block].attentions if layer == "attn" else vit.blocks[block].mlps
    vectors = []
    for part in parts:
        values = part.proj.weight.T
        for step in part.outer if variant == "corrected" else ():
            values = _scaled(values, step)
        vectors.append(values)
    return torch.cat(vectors)


def _scaled(values: Tensor, step: Step) -> Tensor:
    # A norm after the branch depends on the token, so its value vectors are taken before it.
    return step(values) if isinstance(step, Scale) else values


@register_study
class MemoriesStudy(ModelStudy):
    """Whether value vectors stand for classes and are used by tokens of these classes.

    Class–value agreement of weights (Vilas et al. §5.1) beside a randomly initialised model,
    key–value agreement rate of tokens (§5.2) beside a random class, also in correctly classified
    and in misclassified images, and the compositionality of memories (§5.3), for the attention and
    the MLP of every block.

    Variants: ``"paper"`` asks whether a strong memory is among the 5 best memories of the class,
    as the published code does, ``"corrected"`` whether the class is among the 5 best classes of
    the memory; ``"paper"`` also reads value vectors without LayerScale and takes the top-left
    pixel of a patch for its mask.

    Args:
        config: the model and how it is studied.

    Raises:
        UnsupportedModelError: if the classifier is no single matrix.
    """

    name = "memories"

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config)
        self.depth = len(self.vit.blocks)
        self.places = [(b, f"{layer}_out") for layer in _LAYERS for b in range(self.depth)]
        self.values = self._read_values(self.vit)
        rows = len(self.places)
        self.value_agreement = ClassValueAgreement(rows, self.vit.num_classes)
        control = None
        if config.random_model is not None:
            random = self._read_values(adapt(config.random_model()))
            control = torch.stack([v.agreement for v in random]).cpu()
        own = torch.stack([v.agreement for v in self.values]).cpu()
        self.value_agreement.update(own, control)
        self.agreement = KeyValueAgreement(rows, self.variant)
        self.control = KeyValueAgreement(rows, self.variant)
        self.compositionality = MemoryCompositionality(rows)
        self.by_outcome = {name: GroupedMean(rows) for name in ("correct", "misclassified")}
        self.difference = self.class_context(rows)
        self.metrics = nn.ModuleDict(
            {
                "value_agreement": self.value_agreement,
                "agreement": self.agreement,
                "control": self.control,
                "compositionality": self.compositionality,
                "difference": self.difference,
                **self.by_outcome,
            }
        )

    def _read_values(self, vit: ViT) -> list[VectorClasses]:
        return [
            read_vectors(_value_vectors(vit, layer, block, self.variant), vit.readout, _STRONGEST)
            for layer in _LAYERS
            for block in range(len(vit.blocks))
        ]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "random_model": self.config.random_model is not None}

    def update(self, batch: Batch) -> None:
        sites = [f"{layer}_{kind}" for layer in _LAYERS for kind in ("out", "coefficients")]
        recording = record(self.vit, batch.images, sites)
        strongest, tops = [], []
        for block, site in self.places:
            held = recording[site.replace("_out", "_coefficients")][block]
            coefficients = held[0] if len(held) == 1 else torch.cat(held, -1)
            strongest.append(coefficients.topk(_STRONGEST, dim=-1).indices)
            scores = self.reader(block, site).scores(recording[site][block], batch.labels)
            tops.append(scores.top[..., 0])
        members = self.members(batch, tops[0].shape[1])
        classes = self.vit.num_classes
        other = random_classes(batch.labels, batch.indices, classes, self.config.seed)
        agreeing = self.agreement.agreeing(strongest, self.values, batch.labels)
        self.agreement.count_agreeing(agreeing, members)
        right = recording.logits.argmax(-1) == batch.labels
        for name, of in (("correct", right), ("misclassified", ~right)):
            self.by_outcome[name].update(agreeing, members & of[:, None])
        self.control.update(strongest, self.values, other, members)
        self.compositionality.update(strongest, self.values, torch.stack(tops), members)
        if batch.masks is not None:
            self.difference.update(agreeing, members, batch.indices)

    def tables(self) -> dict[str, list[Row]]:
        rows = []
        found = self.value_agreement.compute()
        for place, value, control, p in zip(
            self.places, found.value, found.control, found.p, strict=True
        ):
            rows.append(self.row("class_value_agreement", value, found.n, place))
            if not control.isnan():
                rows.append(self.row("class_value_agreement_random_model", control, found.n, place))
                rows.append(self.row("class_value_agreement_wilcoxon_p", p, found.n, place))
        for metric, means in (
            ("key_value_agreement_rate", self.agreement.compute()),
            ("key_value_agreement_rate_random_class", self.control.compute()),
            *(
                (f"key_value_agreement_rate_{name}", metric.compute())
                for name, metric in self.by_outcome.items()
            ),
            ("memory_compositionality", self.compositionality.compute()),
        ):
            rows += self.group_rows(metric, means, self.places)
        rows += self.difference_rows("key_value_agreement_rate", self.difference, self.places)
        return {self.name: rows}

    def headline(self, tables: dict[str, list[Row]]) -> Sequence[Row]:
        rows = select(tables[self.name], block=self.depth - 1, group="all")
        metrics = ("class_value_agreement", "key_value_agreement_rate", "memory_compositionality")
        return [row for row in rows if row.metric in metrics]

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.studies.memories.figure import draw

        return draw(tables[self.name])
