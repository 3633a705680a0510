"""Identifiability of class tokens without the context, and of context tokens without the class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_classemb.data import OBJECT
from captum_classemb.edit import kept_tokens, remove_tokens
from captum_classemb.errors import InputError
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row
from captum_classemb.studies.group_means import GroupedMean
from captum_classemb.studies.perturbation import UNPERTURBED, PerturbationStudy
from captum_classemb.studies.token_perturbation.figure import RATE, REMOVED, draw
from captum_classemb.vit import record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register_study
class TokenPerturbationStudy(PerturbationStudy):
    """How identifiable class tokens are without the context, and context tokens without the class.

    Tokens are removed after position embeddings are added (Vilas et al. §4.2), and compared with
    the same tokens of the unperturbed pass. Images that have no mask, or only tokens of one kind,
    are left out.

    Variants: ``"corrected"`` counts image tokens, all alike; ``"paper"`` counts CLS among the
    tokens of the perturbed passes, gives the mean over images of each one's rate, and takes the
    top-left pixel of a patch for its mask.

    Args:
        config: the model and how it is studied.

    Raises:
        InputError: in the first batch, if the dataset has no masks.
    """

    name = "token-perturbation"

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config, (UNPERTURBED, *REMOVED))
        if self.variant == "paper":
            for name in REMOVED:
                self.metrics[f"{name}/rate"] = GroupedMean(self.depth)

    def update(self, batch: Batch) -> None:
        if batch.masks is None:
            raise InputError(
                "the dataset has neither masks nor boxes: which tokens are of the class and "
                "which of the context is not known."
            )
        size = (batch.images.shape[2], batch.images.shape[3])
        h, w = self.vit.grid(size)
        members = self.members(batch, self.vit.prefix_tokens + h * w)
        both = members[2:].any(-1).all(0)
        images, target, members = batch.images[both], batch.labels[both], members[:, both]
        if not len(images):
            return
        recording = record(self.vit, images, ["resid_post"])
        ranks = self.ranks(recording, target)
        self.count(UNPERTURBED, recording.logits, target, ranks, members)
        for name, (removed, _) in REMOVED.items():
            gone = members[2 if removed == OBJECT else 3]
            self._count_without(name, images, target, members, gone)

    def _count_without(
        self, name: str, images: Tensor, target: Tensor, members: Tensor, gone: Tensor
    ) -> None:
        keep = ~gone[:, self.vit.prefix_tokens :]
        with remove_tokens(self.vit, keep):
            recording = record(self.vit, images, ["resid_post"])
        kept = kept_tokens(keep, self.vit.prefix_tokens)
        ranks = self.ranks(recording, target)
        left = members.gather(2, kept.places.expand(len(members), -1, -1)) & kept.real
        self.count(name, recording.logits, target, ranks, left)
        if self.variant == "paper":
            rate: Any = self.metrics[f"{name}/rate"]
            counted = kept.real
            by_image = ((ranks == 0) & counted).sum(-1) / counted.sum(-1)
            once = torch.ones_like(left[..., :1])
            rate.update(by_image[..., None], once)

    def condition_rows(self, name: str) -> Iterator[Row]:
        group = None if name == UNPERTURBED else REMOVED[name][1]
        for row in super().condition_rows(name):
            # Of a pass without the context, all image tokens left are of the class.
            if group is not None and (row.tokens, row.group) in (("image", "all"),):
                continue
            if self.variant == "paper" and group == row.group and row.metric.endswith(RATE):
                continue
            yield row
        if self.variant == "paper" and group is not None:
            rate: Any = self.metrics[f"{name}/rate"]
            found = rate.compute()
            for place, value in zip(self.places, found.value[:, 1], strict=True):
                yield self.row(f"{name}/{RATE}", value, found.n[1], place, "image", group)

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        return draw(tables[self.name])
