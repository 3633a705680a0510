"""Faithfulness of attribution methods: removal curves, localisation, axioms and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from captum_classemb.attr import METHODS, PatchAttribution
from captum_classemb.attr.together import SharedPass
from captum_classemb.data import OBJECT
from captum_classemb.errors import InputError
from captum_classemb.evaluation import BoxLocalisation, MaskLocalisation, RemovalCurves
from captum_classemb.evaluation.axioms import axioms
from captum_classemb.evaluation.bootstrap import bootstrap_mean, paired_difference
from captum_classemb.evaluation.cost import Cost, map_cost
from captum_classemb.evaluation.removal_curves import Perturbation
from captum_classemb.evaluation.removal_metric import SIDES, RandomRemoval
from captum_classemb.evaluation.removal_order import MEASURES
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row
from captum_classemb.studies.faithfulness.figure import draw
from captum_classemb.studies.faithfulness.probes import (
    BY_PROBE,
    check_positions,
    digest,
    load_probe,
)
from captum_classemb.studies.model_study import ModelStudy
from captum_classemb.vit import ViT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captum_classemb.data import StudyDataset

_DEFAULT = ("patch-importance", "class-embedding-gradient", "chefer", "rollout")
_NOWHERE = (-1, "")
_HALVES = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
_AXIOMS = ("infidelity", "sensitivity", "randomised")
#: Images that cost and axioms are measured on: the first of the first batch.
_MEASURED = 16


class _Values(Metric):
    """A row of numbers for each image."""

    full_state_update = False
    rows: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, rows: Tensor) -> None:
        self.rows.append(rows.double())  # type: ignore[union-attr]

    def compute(self) -> Tensor:
        return self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)


@register_study
class FaithfulnessStudy(ModelStudy):
    """Removal curves, localisation, axioms and cost of several attribution methods.

    Areas under the curves of accuracy, target probability and target logit, their gap (negative −
    positive), the first method's gap minus that of each other one, the same curves for five random
    orders, and, where the dataset has masks or boxes, energy inside, the pointing game and average
    precision.

    Variants: ``"paper"`` gives areas as published (each curve divided by its own maximum, the
    unperturbed point left out), ``"corrected"`` ordinary areas with bootstrap intervals.

    Args:
        config: the model and how it is studied.
        methods: names of :data:`~captum_classemb.attr.METHODS`.
        steps: evenly spaced points after the unperturbed one.
        perturbation: ``"tokens"``, ``"mean"`` or ``"blur"``.
        probe: the file of linear probes that the method ``"linear-probe"`` reads patches with, of
            every block of this model; as the study ``linear-probing`` writes it. Its probes should
            have been fitted on other images than those of this study.
        target: the class that is explained and measured: the ``"label"`` or the ``"predicted"``
            one.
        half: ``"all"`` images, those of ``"even"`` index to choose designs on, or those of
            ``"odd"`` index to report on.
        axioms: also measure infidelity, sensitivity and the correlation with the maps of a
            shuffled model, on 16 images.
        cost: also measure passes, time and memory of a map, on a batch of 16.

    Raises:
        InputError: for an unknown method; if the method ``"linear-probe"`` and a probe do not come
            together; if the probe was fitted to another model.
        CheckpointError: if the file is missing, or holds no readout.
        UnsupportedModelError: if a method is not defined for the model.
    """

    name = "faithfulness"
    parameters = (
        click.Option(
            ["--method", "methods"],
            type=click.Choice(list(METHODS)),
            multiple=True,
            default=_DEFAULT,
            show_default=True,
            help="A method to measure (several allowed).",
        ),
        click.Option(
            ["--steps"],
            type=click.IntRange(min=1),
            default=20,
            show_default=True,
            help="Points of a curve after the unperturbed one.",
        ),
        click.Option(
            ["--perturbation"],
            type=click.Choice(["tokens", "mean", "blur"]),
            default="tokens",
            show_default=True,
            help="Take tokens out, or paint pixels in the mean colour, or blur them.",
        ),
        click.Option(
            ["--probe"],
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Linear probes for --method linear-probe: what study linear-probing writes with "
            "--save-probes.",
        ),
        click.Option(
            ["--target"],
            type=click.Choice(["label", "predicted"]),
            default="label",
            show_default=True,
            help="The class that is explained and measured.",
        ),
        click.Option(
            ["--half"],
            type=click.Choice(list(_HALVES)),
            default="all",
            show_default=True,
            help="Images of even index, to choose designs on, or of odd index, to report on.",
        ),
        click.Option(["--axioms"], is_flag=True, help="Also infidelity, sensitivity, sanity."),
        click.Option(["--cost"], is_flag=True, help="Also passes, time and memory of a map."),
    )

    def __init__(
        self,
        config: StudyConfig,
        methods: Sequence[str] = _DEFAULT,
        steps: int = 20,
        perturbation: Perturbation = "tokens",
        probe: str | Path | None = None,
        target: Literal["label", "predicted"] = "label",
        half: str = "all",
        axioms: bool = False,
        cost: bool = False,
    ) -> None:
        super().__init__(config)
        if target not in ("label", "predicted") or half not in _HALVES:
            raise InputError(
                f"target {target!r} is 'label' or 'predicted', and half {half!r} one of "
                f"{', '.join(_HALVES)}."
            )
        unknown = [method for method in methods if method not in METHODS]
        if unknown or not methods:
            raise InputError(
                f"method {unknown[0] if unknown else ''!r} is none of {', '.join(METHODS)}."
            )
        self.methods = tuple(dict.fromkeys(methods))
        self.steps, self.perturbation = steps, perturbation
        self.target, self.half, self.axioms, self.cost = target, half, axioms, cost
        self.probe = load_probe(probe, self.methods, self.vit)
        self.attributions = {method: self._build(method, self.vit) for method in self.methods}
        self.random = RandomRemoval(steps, perturbation)
        self.metrics = nn.ModuleDict({"random": self.random})
        for method in self.methods:
            self.metrics[f"curve {method}"] = RemovalCurves(steps, perturbation)
            self.metrics[f"place {method}"] = BoxLocalisation()
            self.metrics[f"mask {method}"] = MaskLocalisation()
            self.metrics[f"axioms {method}"] = _Values()
            self.metrics[f"cost {method}"] = _Values()

    def settings(self) -> dict[str, Any]:
        own = {
            "methods": list(self.methods),
            "steps": self.steps,
            "perturbation": self.perturbation,
            "probe": None if self.probe is None else digest(self.probe),
            "target": self.target,
            "half": self.half,
            "axioms": self.axioms,
            "cost": self.cost,
        }
        return {**super().settings(), **own}

    def _build(self, method: str, vit: ViT) -> PatchAttribution:
        given = (self.probe,) if method == BY_PROBE else ()
        return METHODS[method].build(vit, *given)

    def _maps(self, method: str, vit: ViT) -> Callable[[Tensor, Tensor], Tensor]:
        """From images and targets to maps B×h×w."""
        attribution = self.attributions[method] if vit is self.vit else self._build(method, vit)

        def maps(images: Tensor, target: Tensor) -> Tensor:
            patches = attribution.attribute_patches(images, target).detach()
            return patches.flatten(1, -3).sum(1).float()

        return maps

    def passes(self, data: StudyDataset, images: Sequence[int]) -> list[Sequence[int]]:
        if self.probe is not None and self.probe.positions is not None:
            height, width = data[images[0]].image.shape[-2:]
            h, w = self.vit.grid((height, width))
            check_positions(self.probe.positions, self.vit.prefix_tokens + h * w)
        return super().passes(data, images[_HALVES[self.half]])

    def update(self, batch: Batch) -> None:
        shared = SharedPass(self.vit, list(self.attributions.values()), batch.images)
        predicted = self.target == "predicted"
        target = shared.done.logits.argmax(-1) if predicted else batch.labels
        index = target[:, None]
        each = {name: shared.maps(m, index)[:, 0] for name, m in self.attributions.items()}
        shared.finish()
        self.random.update(self.vit, batch.images, batch.indices, target)
        for method, maps in each.items():
            curve: Any = self.metrics[f"curve {method}"]
            curve.update(self.vit, batch.images, maps, target)
            if batch.masks is None:
                continue
            objects = batch.masks == OBJECT
            known = objects.flatten(1).any(1)
            if known.any():
                for kind in ("place", "mask"):
                    place: Any = self.metrics[f"{kind} {method}"]
                    place.update(maps[known], objects[known])
        if batch.number == 0:
            self._measure(batch.images[:_MEASURED], target[:_MEASURED])

    def _measure(self, images: Tensor, target: Tensor) -> None:
        for method in self.methods:
            if self.axioms:
                found = axioms(partial(self._maps, method), self.vit, images, target)
                values: Any = self.metrics[f"axioms {method}"]
                values.update(torch.stack([found[name].cpu() for name in _AXIOMS], 1))
            if self.cost:
                cost = map_cost(self.vit, self._maps(method, self.vit), images, target)
                values = self.metrics[f"cost {method}"]
                values.update(torch.tensor(cost).expand(len(images), -1))

    def tables(self) -> dict[str, list[Row]]:
        summary, curves = [], []
        for method in self.methods:
            summary += list(self._area_rows(method))
            curves += list(self._curve_rows(method))
            place: Any = self.metrics[f"place {method}"]
            if len(place.rows):
                mask: Any = self.metrics[f"mask {method}"]
                found = {**place.images(), "average_precision": mask.images()["average_precision"]}
                for name, values in found.items():
                    summary.append(self._mean_row(f"{method}/{name}", values))
            for kind, names in (("axioms", _AXIOMS), ("cost", Cost._fields)):
                measured: Any = self.metrics[f"{kind} {method}"]
                if len(measured.rows):
                    for name, values in zip(names, measured.compute().T, strict=True):
                        summary.append(self._mean_row(f"{method}/{kind}/{name}", values))
        curves += list(self._random_rows())
        for measure, values in self.random.images().items():
            summary.append(self._mean_row(f"random/{measure}/area", values))
        return {"areas": summary, "curves": curves}

    def _mean_row(self, metric: str, values: Tensor) -> Row:
        """The mean over the images that have a value."""
        known = values[~values.isnan()]
        return self.row(metric, known.mean(), len(known), _NOWHERE)

    def _area_rows(self, method: str) -> Iterator[Row]:
        metric: Any = self.metrics[f"curve {method}"]
        n = len(metric.curves().values)
        if self.variant == "paper":
            areas = metric.compute()
            for measure in MEASURES[:2]:
                for side in SIDES:
                    value = areas[f"{measure}/paper_{side}"]
                    yield self.row(f"{method}/{measure}/{side}", value, n, _NOWHERE)
            return
        best: Any = self.metrics[f"curve {self.methods[0]}"]
        first = best.images()
        for area, by_image in metric.images().items():
            found = {"": bootstrap_mean(by_image, seed=self.config.seed)}
            if method != self.methods[0]:
                against = paired_difference(first[area], by_image, seed=self.config.seed)
                found["/first_minus_this"] = against
            for end, interval in found.items():
                name = f"{method}/{area}{end}"
                yield self.row(name, interval.mean, n, _NOWHERE)
                yield self.row(f"{name}/low", interval.low, n, _NOWHERE)
                yield self.row(f"{name}/high", interval.high, n, _NOWHERE)

    def _curve_rows(self, method: str) -> Iterator[Row]:
        metric: Any = self.metrics[f"curve {method}"]
        removed, values, _ = metric.curves()
        mean = values.double().mean(0)
        for s, share in enumerate((removed / removed[-1]).tolist()):
            for o, side in enumerate(SIDES):
                for m, measure in enumerate(MEASURES):
                    name = f"{method}/{measure}/{side}@{share:.4f}"
                    yield self.row(name, mean[o, s, m], len(values), _NOWHERE)

    def _random_rows(self) -> Iterator[Row]:
        """Curves of random orders: their mean, lowest and highest over seeds."""
        removed, values, _ = self.random.curves()
        by_seed = values.double().mean(0)
        of = {"mean": by_seed.mean(0), "low": by_seed.amin(0), "high": by_seed.amax(0)}
        for kind, curve in of.items():
            for s, share in enumerate((removed / removed[-1]).tolist()):
                for m, measure in enumerate(MEASURES):
                    name = f"random/{measure}/{kind}@{share:.4f}"
                    yield self.row(name, curve[s, m], len(values), _NOWHERE)

    def headline(self, tables: dict[str, list[Row]]) -> Sequence[Row]:
        ends = (
            "accuracy/negative", "accuracy/positive", "accuracy/gap", "energy", "pointing",
            "axioms/infidelity", "cost/time", "random/accuracy/area",
        )  # fmt: skip
        return [row for row in tables["areas"] if row.metric.endswith(ends)]

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        return draw(tables["curves"], tables["areas"])
