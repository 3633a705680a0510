"""Metrics of feature maps by depth: one forward pass feeds them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torchmetrics import Metric

from captum_classemb.dynamics.inference import images_in
from captum_classemb.dynamics.tracing.traced_steps import (
    StepKind,
    TracedStep,
    find_steps,
    watch_steps,
)
from captum_classemb.errors import InputError


class DepthMetrics(nn.Module):
    """One metric of each sort for every step of a model.

    ``update(images)`` records the feature maps of one batch, once for all metrics.
    ``metrics[sort][i]`` is the metric of step i; the steps are found with the first batch.

    Args:
        model: any vision model with spatial features; used in eval mode and left as it was.
        makes: makes a metric whose ``update`` takes feature maps B×C×h×w, by the sort's name.
        images: images that the model takes, if the steps should be found at once.
    """

    steps: tuple[TracedStep, ...]

    def __init__(
        self,
        model: nn.Module,
        makes: Mapping[str, Callable[[], Metric]],
        images: Tensor | None = None,
    ) -> None:
        super().__init__()
        # Kept out of the children: a checkpoint of the sums need not hold the model.
        self._model = [model]
        self._makes = dict(makes)
        self.steps = ()
        self.metrics = nn.ModuleDict({sort: nn.ModuleList() for sort in makes})
        if images is not None:
            self._find(images)

    def _find(self, images: Tensor) -> None:
        self.steps = find_steps(self._model[0], images)
        for sort, make in self._makes.items():
            found = nn.ModuleList(make().to(images.device) for _ in self.steps)
            self.metrics[sort] = found

    def update(self, images: Tensor) -> None:
        """Add a batch of images B×3×H×W."""
        if not self.steps:
            self._find(images)
        sorts = [self[sort] for sort in self._makes]

        def use(i: int, maps: Tensor) -> None:
            for metrics in sorts:
                metrics[i].update(maps)

        watch_steps(self._model[0], images, self.steps, use)

    def __getitem__(self, sort: str) -> Sequence[Metric]:
        return [cast(Metric, metric) for metric in cast(nn.ModuleList, self.metrics[sort])]

    def compute(self, sort: str) -> list[Tensor]:
        """The value of one sort of metric at every step."""
        if not self.steps:
            raise InputError("There is nothing to compute: no batch of images was given.")
        return [metric.compute() for metric in self[sort]]

    def run(self, batches: Iterable[Any]) -> DepthMetrics:
        """Update with every batch: images, or images and labels."""
        for batch in batches:
            self.update(images_in(batch, self._model[0]))
        return self


class SignAgreement(NamedTuple):
    """How many steps of a kind change a value in the direction the paper says, of how many."""

    agreeing: int
    steps: int


def sign_agreement(
    steps: Sequence[TracedStep], values: Sequence[float], kind: StepKind, rises: bool
) -> SignAgreement:
    """Count the steps of one kind after which a value is higher, or lower, than before.

    Args:
        steps: from :func:`captum_classemb.dynamics.tracing.traced_steps.find_steps`.
        values: one for each step.
        kind: which steps are counted.
        rises: whether the value should rise (MLPs and convolutions) or fall (attention).
    """
    changes = [
        after - before
        for before, after, step in zip(values, values[1:], steps[1:], strict=False)
        if step.kind == kind
    ]
    return SignAgreement(sum((c > 0) if rises else (c < 0) for c in changes), len(changes))
