"""Faithfulness of attribution methods: removal curves and localisation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import nn

from captum_classemb.attr import METHODS, PatchAttribution
from captum_classemb.attr.together import SharedPass
from captum_classemb.data import OBJECT
from captum_classemb.errors import InputError
from captum_classemb.evaluation import BoxLocalisation, RemovalCurves
from captum_classemb.evaluation.bootstrap import bootstrap_mean
from captum_classemb.evaluation.removal_curves import Perturbation
from captum_classemb.evaluation.removal_metric import SIDES
from captum_classemb.evaluation.removal_order import MEASURES
from captum_classemb.readout import LinearProbe, load_readout
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row
from captum_classemb.studies.faithfulness.figure import draw
from captum_classemb.studies.model_study import ModelStudy
from captum_classemb.vit import ViT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captum_classemb.data import StudyDataset

_DEFAULT = ("patch-importance", "class-embedding-gradient", "chefer", "rollout")
_BY_PROBE = "linear-probe"
_NOWHERE = (-1, "")


@register_study
class FaithfulnessStudy(ModelStudy):
    """Removal curves and localisation of several attribution methods.

    Areas under the curves of accuracy, target probability and target logit, their gap (negative −
    positive), and, where the dataset has masks or boxes, energy inside and the pointing game.
    The class explained is the label.

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
    )

    def __init__(
        self,
        config: StudyConfig,
        methods: Sequence[str] = _DEFAULT,
        steps: int = 20,
        perturbation: Perturbation = "tokens",
        probe: str | Path | None = None,
    ) -> None:
        super().__init__(config)
        unknown = [method for method in methods if method not in METHODS]
        if unknown or not methods:
            raise InputError(
                f"method {unknown[0] if unknown else ''!r} is none of {', '.join(METHODS)}."
            )
        self.methods = tuple(dict.fromkeys(methods))
        self.steps, self.perturbation = steps, perturbation
        self.probe = self._load_probe(probe)
        self.attributions = {method: self._attribution(method) for method in self.methods}
        self.metrics = nn.ModuleDict()
        for method in self.methods:
            self.metrics[f"curve {method}"] = RemovalCurves(steps, perturbation)
            self.metrics[f"place {method}"] = BoxLocalisation()

    def settings(self) -> dict[str, Any]:
        own = {
            "methods": list(self.methods),
            "steps": self.steps,
            "perturbation": self.perturbation,
            "probe": None if self.probe is None else _digest(self.probe),
        }
        return {**super().settings(), **own}

    def _load_probe(self, path: str | Path | None) -> LinearProbe | None:
        wanted = _BY_PROBE in self.methods
        if path is None:
            if wanted:
                raise InputError(
                    f"the method {_BY_PROBE} reads patches with fitted probes and no file was "
                    "given: give one with --probe (in Python, probe=)."
                )
            return None
        if not wanted:
            raise InputError(
                f"the probe {path} is read by no method that was chosen: add {_BY_PROBE} to the "
                "methods, or leave it out."
            )
        probe = load_readout(path, self.vit.readout)
        if not isinstance(probe, LinearProbe):
            raise InputError(
                f"{path} holds a {type(probe).__name__}: the method {_BY_PROBE} needs linear "
                "probes."
            )
        _check_probe(probe, path, self.vit)
        return probe

    def _attribution(self, method: str) -> PatchAttribution:
        if method == _BY_PROBE:
            return METHODS[method].build(self.vit, self.probe)
        return METHODS[method].build(self.vit)

    def passes(self, data: StudyDataset, images: Sequence[int]) -> list[Sequence[int]]:
        if self.probe is not None and self.probe.positions is not None:
            height, width = data[images[0]].image.shape[-2:]
            h, w = self.vit.grid((height, width))
            _check_positions(self.probe.positions, self.vit.prefix_tokens + h * w)
        return super().passes(data, images)

    def update(self, batch: Batch) -> None:
        shared = SharedPass(self.vit, list(self.attributions.values()), batch.images)
        index = batch.labels[:, None]
        each = {name: shared.maps(m, index)[:, 0] for name, m in self.attributions.items()}
        shared.finish()
        for method, maps in each.items():
            curve: Any = self.metrics[f"curve {method}"]
            curve.update(self.vit, batch.images, maps, batch.labels)
            if batch.masks is None:
                continue
            objects = batch.masks == OBJECT
            known = objects.flatten(1).any(1)
            if known.any():
                place: Any = self.metrics[f"place {method}"]
                place.update(maps[known], objects[known])

    def tables(self) -> dict[str, list[Row]]:
        summary, curves = [], []
        for method in self.methods:
            metric: Any = self.metrics[f"curve {method}"]
            summary += list(self._area_rows(method, metric))
            curves += list(self._curve_rows(method, metric))
            place: Any = self.metrics[f"place {method}"]
            if len(place.rows):
                counts = {k: int((~v.isnan()).sum()) for k, v in place.images().items()}
                for name, value in place.compute().items():
                    n = counts[name]
                    summary.append(self.row(f"{method}/{name}", value, n, _NOWHERE))
        return {"areas": summary, "curves": curves}

    def _area_rows(self, method: str, metric: Any) -> Iterator[Row]:
        n = len(metric.curves().values)
        if self.variant == "paper":
            areas = metric.compute()
            for measure in MEASURES[:2]:
                for side in SIDES:
                    value = areas[f"{measure}/paper_{side}"]
                    yield self.row(f"{method}/{measure}/{side}", value, n, _NOWHERE)
            return
        for area, by_image in metric.images().items():
            found = bootstrap_mean(by_image, seed=self.config.seed)
            name = f"{method}/{area}"
            yield self.row(name, found.mean, n, _NOWHERE)
            yield self.row(f"{name}/low", found.low, n, _NOWHERE)
            yield self.row(f"{name}/high", found.high, n, _NOWHERE)

    def _curve_rows(self, method: str, metric: Any) -> Iterator[Row]:
        removed, values, _ = metric.curves()
        mean = values.double().mean(0)
        for s, share in enumerate((removed / removed[-1]).tolist()):
            for o, side in enumerate(SIDES):
                for m, measure in enumerate(MEASURES):
                    name = f"{method}/{measure}/{side}@{share:.4f}"
                    yield self.row(name, mean[o, s, m], len(values), _NOWHERE)

    def headline(self, tables: dict[str, list[Row]]) -> Sequence[Row]:
        ends = ("accuracy/negative", "accuracy/positive", "accuracy/gap", "energy", "pointing")
        return [row for row in tables["areas"] if row.metric.endswith(ends)]

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        return {"curves": draw(tables["curves"], self.methods, self.config.name)}


def _digest(probe: LinearProbe) -> str:
    """SHA-256 of what a file of probes holds: the bytes of equal ones may lie in another order."""
    digest = hashlib.sha256(repr((probe.prefix_tokens, probe.positions, probe.normed)).encode())
    for (block, site), heads in sorted(probe.heads.items()):
        for tensor in (heads.weight, heads.bias):
            digest.update(repr((block, site, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_probe(probe: LinearProbe, path: str | Path, vit: ViT) -> None:
    """Refuse probes that would read another model's tokens, or only some of its blocks."""
    if probe.num_classes != vit.num_classes:
        raise InputError(
            f"the probe {path} has {probe.num_classes} classes and the model {vit.num_classes}: "
            "give one that was fitted to this model."
        )
    if probe.prefix_tokens != vit.prefix_tokens:
        raise InputError(
            f"the probe {path} was fitted to a model with {probe.prefix_tokens} tokens before the "
            f"patches and this one has {vit.prefix_tokens}: give one that was fitted to this model."
        )
    depth = len(vit.blocks)
    foreign = [block for block, _ in probe.places if block >= depth]
    if foreign:
        raise InputError(
            f"the probe {path} reads block {max(foreign)} and the model has blocks 0 to "
            f"{depth - 1}: give one that was fitted to this model."
        )
    missing = [block for block in range(depth) if (block, "resid_post") not in probe.places]
    if missing:
        raise InputError(
            f"the probe {path} has nothing for resid_post of block {missing[0]}, and the method "
            f"{_BY_PROBE} sums over blocks 0 to {depth - 1}: give one that was fitted to all of "
            "them."
        )


def _check_positions(positions: Sequence[int], tokens: int) -> None:
    if set(positions) != set(range(tokens)):
        raise InputError(
            f"the probe was fitted at {len(positions)} positions, the last of them "
            f"{max(positions)}, and an image has {tokens} tokens: give one that was fitted at all "
            "positions of such images."
        )
