"""Accuracy, likelihood and calibration on corrupted images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from captum_classemb.data import data_config
from captum_classemb.data.corrupted import RELEASED, SEVERITIES
from captum_classemb.dynamics.corruptions import SUBSET, corrupt
from captum_classemb.dynamics.robustness import Quality, Robustness
from captum_classemb.dynamics.studies.dynamics_study import DynamicsStudy
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = {"accuracy": "accuracy", "nll": "NLL (nats)", "ece": "calibration error"}


class _Level(NamedTuple):
    """Images of one corruption and severity: as released, or made on the fly (``subset_…``)."""

    corruption: str
    severity: int


_CLEAN = _Level("clean", 0)
_MADE = tuple(_Level(f"subset_{name}", s) for name in SUBSET for s in range(1, SEVERITIES + 1))
_READ = tuple(_Level(name, s) for name in RELEASED for s in range(1, SEVERITIES + 1))


@register_study
class RobustnessStudy(DynamicsStudy):
    """Accuracy, NLL and calibration error on corrupted images.

    A released folder as ``--data`` (layouts ``cifar-c``, ``imagenet-c``) is measured corruption by
    corruption and severity by severity. Of any other dataset the clean images are measured, and
    six corruptions made of them on the fly: a subset of the released ones, of strengths of its
    own, called ``subset_…`` in the table.
    """

    name = "robustness"
    variants = False

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config)
        pixels = data_config(config.model)
        self.mean = torch.tensor(pixels["mean"])[:, None, None]
        self.std = torch.tensor(pixels["std"])[:, None, None]
        self.levels = (_CLEAN, *_MADE, *_READ)
        self.quality = nn.ModuleList(Robustness() for _ in self.levels)
        self.metrics = nn.ModuleDict({"quality": self.quality})

    def _of(self, level: _Level) -> Robustness:
        return cast(Robustness, self.quality[self.levels.index(level)])

    def update(self, batch: Batch) -> None:
        conditions = batch.conditions or ("",) * len(batch.indices)
        for condition in dict.fromkeys(conditions):
            chosen = torch.tensor([other == condition for other in conditions])
            corruption, _, severity = condition.partition("/")
            level = _Level(corruption, int(severity)) if condition else _CLEAN
            at = chosen.to(batch.images.device)
            images, labels = batch.images[at], batch.labels[at]
            self._of(level).update(self.config.model, images, labels)
            if level == _CLEAN:
                self._make(images, labels, batch.number)

    def _make(self, images: Tensor, labels: Tensor, number: int) -> None:
        """Measure clean images under the corruptions made on the fly."""
        mean, std = self.mean.to(images), self.std.to(images)
        pixels = (images * std + mean).clamp(0, 1)
        for level in _MADE:
            name = level.corruption.removeprefix("subset_")
            corrupted = corrupt(pixels, name, level.severity, self.config.seed + number)
            self._of(level).update(self.config.model, (corrupted - mean) / std, labels)

    def rows(self) -> list[Row]:
        found: dict[_Level, Quality] = {}
        counts: dict[_Level, float] = {}
        for level in self.levels:
            metric = self._of(level)
            if count := float(metric.count.sum()):
                found[level], counts[level] = metric.compute(), count
        rows = [
            self.row(f"{level.corruption}_{measure}@{level.severity}", value, counts[level])
            for level, quality in found.items()
            for measure, value in quality._asdict().items()
        ]
        corrupted = [level for level in found if level != _CLEAN]
        for measure in _LABELS if corrupted else ():
            # Every corruption and severity weighs the same, as in the benchmark's own mean.
            values = torch.stack([getattr(found[level], measure) for level in corrupted])
            total = sum(counts[level] for level in corrupted)
            rows.append(self.row(f"corrupted_{measure}", values.mean(), total))
        return rows

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        from captum_classemb.dynamics.figures.landscapes import robustness_lines

        values = {row.metric: row.value for row in tables["robustness"]}
        names = _whole(list(values))
        if not names:
            return {}
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        for axis, (measure, label) in zip(figure.subplots(1, 3), _LABELS.items(), strict=True):
            table = [
                [values[f"{name}_{measure}@{s}"] for s in range(1, SEVERITIES + 1)]
                for name in names
            ]
            robustness_lines(axis, {self.config.name: np.array(table)}, label)
        return {"robustness": figure}

    def headline(self, tables: dict[str, list[Row]]) -> list[Row]:
        shown = ("clean_", "corrupted_")
        return [row for row in tables["robustness"] if row.metric.startswith(shown)]


def _whole(metrics: Sequence[str]) -> list[str]:
    """Corruptions that were measured at every severity."""
    names = dict.fromkeys(level.corruption for level in (*_MADE, *_READ))
    severities = range(1, SEVERITIES + 1)
    return [n for n in names if all(f"{n}_accuracy@{s}" in metrics for s in severities)]
