"""Fourier amplitudes and variance of feature maps by depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
from torch import nn

from captum_classemb.dynamics.depth import DepthMetrics, sign_agreement
from captum_classemb.dynamics.fourier import FourierAmplitude
from captum_classemb.dynamics.studies.dynamics_study import DynamicsStudy, numbers, one_axis
from captum_classemb.dynamics.tracing.traced_steps import StepKind
from captum_classemb.dynamics.variance import FeatureMapVariance
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DepthStudy(DynamicsStudy):
    """A study of one metric after every step of the model.

    Attributes:
        quantity: what the signs of its changes are said of, in the names of metrics.
    """

    labelled = False
    quantity: ClassVar[str]

    def __init__(
        self, config: StudyConfig, metric: type[FourierAmplitude] | type[FeatureMapVariance]
    ) -> None:
        super().__init__(config)
        self.depth = DepthMetrics(
            config.model,
            {self.name: lambda: metric(self.variant)},
            self.example(),
        )
        self.metrics = nn.ModuleDict({"depth": self.depth})

    def update(self, batch: Batch) -> None:
        self.depth.update(batch.images)

    def agreement_rows(self, values: list[float]) -> Iterator[Row]:
        """How often attention lowers the quantity, and MLPs and convolutions raise it."""
        kinds: tuple[StepKind, ...] = ("attention", "mlp", "convolution")
        for kind in kinds:
            rises = kind != "attention"
            found = sign_agreement(self.depth.steps, values, kind, rises)
            if found.steps:
                name = f"share_{'raising' if rises else 'lowering'}_{self.quantity}"
                yield self.row(name, found.agreeing / found.steps, found.steps, -1, kind)

    def headline(self, tables: dict[str, list[Row]]) -> list[Row]:
        return [row for row in tables[self.name] if row.metric.startswith("share")]


@register_study
class FourierStudy(DepthStudy):
    """High-frequency amplitude of feature maps by depth: does attention lower it, do MLPs raise it?

    Variants: ``"paper"`` takes the diagonal of the spectrum, which stops short of the highest
    frequency; ``"corrected"`` the mean over rings of equal radial frequency, up to π.
    """

    name = "fourier"
    quantity = "high_frequencies"

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config, FourierAmplitude)

    def rows(self) -> list[Row]:
        lines = self.depth.compute("fourier")
        rows = []
        high = [float(line[-1]) for line in lines]
        for step, line, metric in zip(self.depth.steps, lines, self.depth["fourier"], strict=True):
            fourier = cast(FourierAmplitude, metric)
            n = fourier.images
            for frequency, value in zip(fourier.frequencies, line, strict=True):
                name = f"delta_log_amplitude@{float(frequency):.4f}"
                rows.append(self.row(name, value, n, step.block, step.kind))
        return [*rows, *self.agreement_rows(high)]

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        from captum_classemb.dynamics.figures.profiles import depth_profile, fourier_lines

        frequencies: list[list[float]] = []
        lines: list[list[float]] = []
        kinds: list[str] = []
        for row in tables["fourier"]:
            if not row.metric.startswith("delta"):
                continue
            (frequency,) = numbers(row.metric)
            if frequency == 0:
                frequencies.append([])
                lines.append([])
                kinds.append(row.site)
            frequencies[-1].append(frequency)
            lines[-1].append(row.value)
        figure = Figure(figsize=(10.5, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
        fourier_lines(left, [np.array(f) for f in frequencies], [np.array(a) for a in lines])
        high = {self.config.name: [line[-1] for line in lines]}
        depth_profile(right, kinds, high, "Δ log amplitude, highest frequency")
        return {"fourier": figure}


@register_study
class VarianceStudy(DepthStudy):
    """Variance of feature maps over space by depth, and the share of it that one channel carries.

    Variants: ``"paper"`` is the mean over channels of the variance; ``"corrected"`` the share of
    the feature map's energy that varies over space.
    """

    name = "variance"
    quantity = "variance"

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config, FeatureMapVariance)

    def rows(self) -> list[Row]:
        rows = []
        values = [float(value) for value in self.depth.compute("variance")]
        for step, value, metric in zip(
            self.depth.steps, values, self.depth["variance"], strict=True
        ):
            variance = cast(FeatureMapVariance, metric)
            n = variance.images
            rows.append(self.row("variance", value, n, step.block, step.kind))
            largest = variance.largest_channel()
            rows.append(self.row("largest_channel_share", largest, n, step.block, step.kind))
        return [*rows, *self.agreement_rows(values)]

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.dynamics.figures.profiles import depth_profile

        rows = select(tables["variance"], metric="variance")
        figure, axis = one_axis()
        label = "feature map variance"
        if self.variant == "corrected":
            label = "share of energy that varies over space"
        values = {self.config.name: [row.value for row in rows]}
        log = self.variant == "paper"
        depth_profile(axis, [row.site for row in rows], values, label, log=log)
        return {"variance": figure}
