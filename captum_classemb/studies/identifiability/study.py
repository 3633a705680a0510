"""The study of identifiability, change rates and residual composition."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from captum_classemb.atomic_file import write_atomically
from captum_classemb.errors import InputError
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.class_identifiability import Accuracy, ClassIdentifiability
from captum_classemb.studies.group_means import Means
from captum_classemb.studies.identifiability.metric import (
    SOURCES,
    ClassSimilarityChangeRate,
    ResidualComposition,
)
from captum_classemb.studies.model_study import ModelStudy
from captum_classemb.studies.token_reader import TokenScores, target_logits
from captum_classemb.vit import Recording, record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SITES = ("resid_post", "attn_out", "mlp_out")
_SAVED_CLASSES = 5


@register_study
class IdentifiabilityStudy(ModelStudy):
    """How identifiable the correct class is in every token, block by block.

    Class identifiability (Vilas et al. §4.1), class similarity change rate of blocks and layers
    (§4.2), and which part of a block its output's top class comes from (§4.3), for CLS, image,
    class and context tokens.

    Variants: ``"paper"`` compares the MLP's output with the output of the block before, whose
    attention it has not seen, where ``"corrected"`` takes the MLP's own input; it starts at the
    second block; it counts composition as published; it takes the top-left pixel of a patch
    for its mask; and class and context tokens are compared token by token, pooled over images,
    with a one-sided p of 300 shuffles, where ``"corrected"`` compares an image's means.

    Args:
        config: the model and how it is studied.
        save_tokens: also write rank, target logit and the 5 best classes of every token, as
            ``tokens/batch-….npz``.
    """

    name = "identifiability"
    parameters = (
        click.Option(
            ["--save-tokens"],
            is_flag=True,
            help="Also write ranks, target logits and top-5 classes of every token (npz).",
        ),
    )

    def __init__(self, config: StudyConfig, save_tokens: bool = False) -> None:
        super().__init__(config)
        if save_tokens and config.output is None:
            raise InputError("save_tokens needs an output folder.")
        self.save_tokens = save_tokens
        self.depth = len(self.vit.blocks)
        self.places = [(block, site) for site in _SITES for block in range(self.depth)]
        # The published code has no input for the first block.
        self.first = 1 if self.variant == "paper" else 0
        self.changes = [(block, site) for site in _SITES for block in range(self.first, self.depth)]
        rows, classes = len(self.places), self.readout.num_classes
        self.accuracy = Accuracy()
        self.identifiability = ClassIdentifiability(rows, classes)
        self.change_rate = ClassSimilarityChangeRate(len(self.changes))
        self.composition = ResidualComposition(self.depth - 1, self.variant)
        self.identifiability_difference = self.class_context(rows, classes, -1.0 / classes, 1.0)
        self.change_rate_difference = self.class_context(len(self.changes))
        self.metrics = nn.ModuleDict(
            {
                "accuracy": self.accuracy,
                "identifiability": self.identifiability,
                "change_rate": self.change_rate,
                "composition": self.composition,
                "identifiability_difference": self.identifiability_difference,
                "change_rate_difference": self.change_rate_difference,
            }
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "save_tokens": self.save_tokens}

    def update(self, batch: Batch) -> None:
        corrected = self.variant == "corrected"
        parallel = any(block.parallel for block in self.vit.blocks)
        wanted = [*_SITES, "embedding", *(["resid_mid"] if corrected and not parallel else [])]
        recording = record(self.vit, batch.images, wanted)
        scores = self._scores(recording, batch.labels)
        ranks = torch.stack([s.rank for s in scores])
        logits = torch.stack([s.target_logit for s in scores]).unflatten(0, (3, self.depth))
        members = self.members(batch, ranks.shape[-1])
        self.accuracy.update(recording.logits, batch.labels)
        self.identifiability.update(ranks, members)
        after, before = self._changes(recording, logits, batch.labels)
        self.change_rate.update(after, before, members)
        top = torch.stack([s.top[..., 0] for s in scores[: self.depth]])
        layers = torch.stack([s.matches for s in scores[self.depth :]]).unflatten(0, (2, -1))
        before_too = (top[1:] == top[:-1])[None]
        self.composition.update(torch.cat([before_too, layers[:, 1:]]), members)
        if batch.masks is not None:
            self.identifiability_difference.update(ranks, members, batch.indices)
            self.change_rate_difference.update(after > before, members, batch.indices)
        if self.save_tokens:
            self._save(batch, scores)

    def _scores(self, recording: Recording, target: Tensor) -> list[TokenScores]:
        """Scores in the order of :attr:`places`; layers are compared with their block's output."""
        scores: list[TokenScores] = []
        for block, site in self.places:
            whole = site == "resid_post"
            top = _SAVED_CLASSES if self.save_tokens else int(whole)
            reference = None if whole else scores[block].top[..., 0]
            reader = self.reader(block, site)
            scores.append(reader.scores(recording[site][block], target, top, reference))
        return scores

    def _changes(
        self, recording: Recording, logits: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The target's logits after and before each layer of :attr:`changes`, R×B×N."""
        post = logits[0]
        if self.variant == "paper":
            before = post[:-1]
            return logits[:, 1:].flatten(0, 1), torch.cat([before] * 3)
        embedded = self._target_logits(recording, "embedding", 0, target)
        block_input = torch.cat([embedded[None], post[:-1]])
        mlp_input = torch.stack(
            [
                block_input[b]
                if block.parallel
                else self._target_logits(recording, "resid_mid", b, target)
                for b, block in enumerate(self.vit.blocks)
            ]
        )
        before = torch.cat([block_input, block_input, mlp_input])
        return logits.flatten(0, 1), before

    def _target_logits(self, recording: Recording, site: str, block: int, target: Tensor) -> Tensor:
        return target_logits(self.readout.at(block, site), recording[site][block], target)

    def _save(self, batch: Batch, scores: Sequence[TokenScores]) -> None:
        assert self.config.output is not None
        shape = (len(_SITES), self.depth)
        rank, logit, top = (
            torch.stack([s[field] for s in scores]).unflatten(0, shape).cpu() for field in range(3)
        )
        buffer = io.BytesIO()
        np.savez(
            buffer,
            sites=np.array(_SITES),
            names=np.array(batch.names),
            labels=batch.labels.cpu().numpy(),
            rank=rank.numpy(),
            target_logit=logit.float().numpy(),
            top5=top.to(torch.int32).numpy(),
        )
        path = self.config.output / "tokens" / f"batch-{batch.number:06d}.npz"
        write_atomically(path, buffer.getvalue())

    def tables(self) -> dict[str, list[Row]]:
        accuracy, images = self.accuracy.compute()
        rows = [self.row("accuracy", accuracy, images, (-1, ""))]
        rows += self.identifiability_rows(self.identifiability.compute(), self.places)
        rows += self.difference_rows(
            "class_identifiability", self.identifiability_difference, self.places
        )
        changes = self.change_rate.compute()
        rows += self.group_rows("class_similarity_change_rate", changes, self.changes)
        rows += self.difference_rows(
            "class_similarity_change_rate", self.change_rate_difference, self.changes
        )
        matches = self.composition.compute()
        values = matches.value.unflatten(0, (-1, len(SOURCES)))
        blocks = [(block, "resid_post") for block in range(1, self.depth)]
        for source, value in zip(SOURCES, values.unbind(1), strict=True):
            name = f"residual_composition_{source}"
            rows += self.group_rows(name, Means(value, matches.n), blocks)
        return {self.name: rows}

    def headline(self, tables: dict[str, list[Row]]) -> Sequence[Row]:
        rows = tables[self.name]
        last = select(rows, block=self.depth - 1, site="resid_post", group="all")
        chosen = [
            row
            for row in last
            if row.metric in ("class_identifiability", "class_identifiability_rate")
        ]
        return select(rows, metric="accuracy") + chosen

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.studies.identifiability.figure import draw

        return draw(tables[self.name])
