"""How predictions and features respond: frequency noise, lesions, similarity of layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from torch import nn

from captum_classemb.dynamics.cka import MinibatchCKA
from captum_classemb.dynamics.frequency_noise import FrequencyNoise
from captum_classemb.dynamics.lesion import LesionAccuracy, find_lesions
from captum_classemb.dynamics.studies.dynamics_study import (
    OTHER_MODEL,
    DynamicsStudy,
    OtherModel,
    numbers,
    one_axis,
)
from captum_classemb.dynamics.tracing.traced_steps import find_steps, record_steps
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig, weights_digest
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _digest(other: OtherModel | None) -> str:
    return "" if other is None else weights_digest(other.model)


@register_study
class FrequencyNoiseStudy(DynamicsStudy):
    """Accuracy of one or two models under noise of one frequency band, of equal energy per band."""

    name = "frequency-noise"
    variants = False
    parameters = (
        click.Option(["--bands"], type=click.IntRange(min=1), default=10, help="Bands up to π."),
        click.Option(
            ["--noise"], type=click.FloatRange(min=0, min_open=True), default=0.3,
            help="Root mean square of the noise, in units of the normalised input.",
        ),
        *OTHER_MODEL,
    )  # fmt: skip

    def __init__(
        self,
        config: StudyConfig,
        bands: int = 10,
        noise: float = 0.3,
        other: str | None = None,
        other_checkpoint: Path | None = None,
    ) -> None:
        super().__init__(config)
        self.models: dict[str, nn.Module] = {config.name: config.model}
        self.other = None if other is None else OtherModel(config, other, other_checkpoint)
        if self.other is not None:
            # A model may be compared with itself, of other weights.
            self.models[f"{other} (other)" if other == config.name else str(other)] = self.other
        self.noises = [FrequencyNoise(bands, noise, config.seed) for _ in self.models]
        self.options = {"bands": bands, "noise": noise, "models": list(self.models)}
        self.metrics = nn.ModuleDict({"noise": nn.ModuleList(self.noises)})

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.options, "other_weights": _digest(self.other)}

    def update(self, batch: Batch) -> None:
        for model, noise in zip(self.models.values(), self.noises, strict=True):
            noise.update(model, batch.images, batch.labels, draw=batch.number)

    def rows(self) -> list[Row]:
        rows = []
        for name, noise in zip(self.models, self.noises, strict=True):
            whole, *bands = noise.compute()
            found = [self.row("accuracy", whole, noise.images)]
            for frequency, value in zip(noise.centres, bands, strict=True):
                found.append(self.row(f"accuracy@{float(frequency):.4f}", value, noise.images))
            rows += [row._replace(model=name) for row in found]
        return rows

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.dynamics.figures.profiles import frequency_noise_lines

        lines = {name: select(tables[self.name], model=name) for name in self.models}
        figure, axis = one_axis()
        frequencies = np.array([numbers(row.metric)[0] for row in lines[self.config.name][1:]])
        values = {name: np.array([row.value for row in rows]) for name, rows in lines.items()}
        frequency_noise_lines(axis, frequencies, values)
        return {self.name: figure}


@register_study
class LesionStudy(DynamicsStudy):
    """Accuracy when one block, attention or MLP is removed, by its position."""

    name = "lesion"
    variants = False

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config)
        self.lesions = find_lesions(config.model, self.example())
        self.accuracy = LesionAccuracy(self.lesions)
        self.metrics = nn.ModuleDict({"accuracy": self.accuracy})

    def update(self, batch: Batch) -> None:
        self.accuracy.update(self.config.model, batch.images, batch.labels)

    def rows(self) -> list[Row]:
        whole, *parts = self.accuracy.compute()
        n = self.accuracy.images
        rows = [self.row("accuracy", whole, n)]
        for lesion, value in zip(self.lesions, parts, strict=True):
            rows.append(self.row("accuracy_without", value, n, lesion.block, lesion.kind))
        return rows

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.dynamics.figures.profiles import lesion_bars

        (whole,) = select(tables["lesion"], metric="accuracy")
        rows = select(tables["lesion"], metric="accuracy_without")
        figure, axis = one_axis((max(6.4, 0.35 * len(rows)), 3.8))
        kinds, blocks = [row.site for row in rows], [row.block for row in rows]
        lesion_bars(axis, kinds, blocks, [row.value for row in rows], whole.value)
        return {"lesion": figure}


@register_study
class CKAStudy(DynamicsStudy):
    """Similarity (mini-batch CKA) of all layers of the model, with itself or with another model.

    A last batch of fewer than four images is left out: it has no unbiased estimate.
    """

    name = "cka"
    variants = False
    labelled = False
    parameters = OTHER_MODEL

    def __init__(
        self, config: StudyConfig, other: str | None = None, other_checkpoint: Path | None = None
    ) -> None:
        super().__init__(config)
        self.other = None if other is None else OtherModel(config, other, other_checkpoint)
        self.other_name = config.name if other is None else other
        self.steps = find_steps(config.model, self.example())
        self.others = self.steps
        if self.other is not None:
            self.others = find_steps(self.other, self.example())
        self.cka = MinibatchCKA(len(self.steps), len(self.others))
        self.metrics = nn.ModuleDict({"cka": self.cka})

    def settings(self) -> dict[str, Any]:
        other = {"other": self.other_name, "other_weights": _digest(self.other)}
        return {**super().settings(), **other}

    def update(self, batch: Batch) -> None:
        if len(batch.indices) < 4 and batch.number:
            return
        first = record_steps(self.config.model, batch.images, self.steps)
        second = None
        if self.other is not None:
            second = record_steps(self.other, batch.images, self.others)
        self.cka.update(first, second)

    def rows(self) -> list[Row]:
        values = self.cka.compute().reshape(len(self.steps), len(self.others))
        return [
            self.row(f"cka@{i},{j}", values[i, j], self.cka.images, step.block, step.kind)
            for i, step in enumerate(self.steps)
            for j in range(len(self.others))
        ]

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.dynamics.figures.profiles import similarity_matrix

        values = np.array([row.value for row in tables["cka"]])
        figure, axis = one_axis((5.2, 4.4))
        table = values.reshape(len(self.steps), len(self.others))
        similarity_matrix(axis, table, (self.config.name, self.other_name))
        return {"cka": figure}
