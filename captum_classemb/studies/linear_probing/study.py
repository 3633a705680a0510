"""Linear probes beside the class embedding, on equal features and equal images."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import Tensor, nn

from captum_classemb.atomic_file import write_atomically
from captum_classemb.data.splits import TrainAndTest
from captum_classemb.errors import DataError, InputError
from captum_classemb.functional.precision import upcast
from captum_classemb.models.names import class_names
from captum_classemb.readout import ClassEmbedding, LinearProbe
from captum_classemb.readout.files import encode_readout
from captum_classemb.readout.probe import features_of, probe_tokens
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.processes import all_reduce
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.linear_probing.metric import (
    FITTED_SITES,
    ProbeStatistics,
    plan_probes,
    stack_probes,
)
from captum_classemb.studies.linear_probing.sums import FittedProbes, ReadCorrectly, Seconds
from captum_classemb.studies.model_study import ModelStudy
from captum_classemb.studies.token_groups import GROUPS
from captum_classemb.vit import record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captum_classemb.data import StudyDataset

FOLDS = 5
_NAMED = 10


@register_study
class LinearProbingStudy(ModelStudy):
    """Linear probes against the class embedding, block by block, on equal features and images.

    Ridge probes (α = 1, ±1 one-hot classes) are fitted to the layer-normed tokens that the class
    embedding reads, one for CLS and one for all image tokens of each place, or one for each
    position (Vilas et al. §7). Both choose among the same classes: those of the images. With a
    training set the probes are fitted on it and read the test set; without one they are fitted on
    four of five folds, stratified by class, and read the fifth.

    The class embedding was trained with the model; a probe sees the images of this study alone.

    Variants: in ``"paper"`` the probes read the hidden states without the norm, as the published
    code does, while the class embedding reads them with it.

    Args:
        config: the model and how it is studied.
        positions: ``"all"``, or token positions like ``"0,17"``: a probe for each.
        memory_limit: MB that the sums may take; with less there are more passes.
        save_probes: also write the probes fitted on all training images, ``probes.safetensors``.

    Raises:
        InputError: if the positions are no numbers.
        UnsupportedModelError: if the model's classifier reads no features of single tokens.
    """

    name = "linear-probing"
    trains = True
    parameters = (
        click.Option(
            ["--positions"],
            metavar="LIST",
            help="A probe for each of these token positions (0,17 or all). Default: one for CLS "
            "and one for all image tokens.",
        ),
        click.Option(
            ["--memory-limit"],
            type=click.IntRange(min=1),
            default=1000,
            metavar="MB",
            help="What the sums may take; with less there are more passes.",
        ),
        click.Option(
            ["--save-probes"],
            is_flag=True,
            help="Also write the probes, to be read by explain --readout.",
        ),
    )

    def __init__(
        self,
        config: StudyConfig,
        positions: str | None = None,
        memory_limit: float = 1000,
        save_probes: bool = False,
    ) -> None:
        super().__init__(config)
        if save_probes and config.output is None:
            raise InputError("save_probes needs an output folder.")
        self.own = features_of(self.vit.readout)
        self.depth = len(self.vit.blocks)
        self.places = [(block, site) for site in FITTED_SITES for block in range(self.depth)]
        self.positions = _positions(positions)
        self.memory_limit = memory_limit
        self.save_probes = save_probes
        self.metrics = nn.ModuleDict()

    def settings(self) -> dict[str, Any]:
        positions = None if self.positions is None else (self.positions or "all")
        own = {"positions": positions, "memory_limit": self.memory_limit}
        return {**super().settings(), **own, "save_probes": self.save_probes}

    # -- What is read in which pass

    def passes(self, data: StudyDataset, images: Sequence[int]) -> list[Sequence[int]]:
        labels = data.labels
        split = isinstance(data, TrainAndTest)
        train, test = list(images), list(images)
        if isinstance(data, TrainAndTest):
            train = [i for i in images if data.trains(i)]
            test = [i for i in images if not data.trains(i)]
        seen = Counter(labels[i] for i in train)
        enough = {label for label, count in seen.items() if split or count > 1}
        self.classes = sorted(enough)
        self.left_out = sorted({labels[i] for i in images} - enough)
        train, test = ([i for i in part if labels[i] in enough] for part in (train, test))
        if len(self.classes) < 2 or not test:
            raise DataError(
                f"{len(self.classes)} classes can be probed, on {len(test)} images: at least 2 "
                "classes are needed, each with 2 images or with a training set."
            )
        ordered = sorted(test, key=lambda i: labels[i])
        self.folds = 1 if split else FOLDS
        # Images of a class lie beside each other, so that its folds differ in size by one at most.
        self.fold = {index: place % self.folds for place, index in enumerate(ordered)}
        self.trained_on = len(train)
        self._allocate(data[images[0]].image)
        return [part for _ in self.plan.passes for part in (train, test)]

    def _allocate(self, image: Tensor) -> None:
        h, w = self.vit.grid((image.shape[1], image.shape[2]))
        count = self.vit.prefix_tokens + h * w
        if self.positions is not None:
            self.positions = self.positions or list(range(count))
            if max(self.positions) >= count:
                raise InputError(
                    f"position {max(self.positions)} is out of range: an image has {count} tokens."
                )
        self.tokens = probe_tokens(self.vit.prefix_tokens, self.positions)
        width = self.own.parts[0].head.weight.shape[1]
        kinds = len(self.classes)
        limit = int(self.memory_limit * 1_000_000)
        self.plan = plan_probes(self.places, self.tokens, width, kinds, self.folds, limit)
        most = max(len(part) for part in self.plan.passes)
        self.statistics = ProbeStatistics(most, width, kinds, self.folds)
        self.fitted, self.seconds = FittedProbes(), Seconds()
        self.probe = ReadCorrectly(len(self.places), len(self.tokens))
        self.projection = ReadCorrectly(len(self.places), len(self.tokens))
        self.model = ReadCorrectly(1, 1)
        self.metrics.update(
            {
                "statistics": self.statistics,
                "fitted": self.fitted,
                "seconds": self.seconds,
                "probe": self.probe,
                "projection": self.projection,
                "model": self.model,
            }
        )
        self.rows = torch.full((self.vit.num_classes,), -1)
        self.rows[self.classes] = torch.arange(kinds)

    def notices(self) -> list[str]:
        how = "a training set" if self.folds == 1 else f"{FOLDS} folds"
        sentences = [
            f"{self.plan}.",
            f"Probes learn {len(self.classes)} classes from {self.trained_on} images ({how}); the "
            "class embedding has seen the training set of the model.",
        ]
        if self.left_out:
            names = [self._class_name(label) for label in self.left_out]
            rest = len(names) - _NAMED
            named = ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
            why = "without training images" if self.folds == 1 else "with fewer than 2 images"
            left = "1 class is" if len(names) == 1 else f"{len(names)} classes are"
            sentences.append(f"{left} left out, {why}: {named}.")
        return sentences

    def _class_name(self, label: int) -> str:
        model = self.vit.model
        return class_names(model)[label] if hasattr(model, "num_classes") else f"class {label}"

    def notes(self) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "classes_left_out": self.left_out,
            "folds": self.folds,
            "bytes_of_sums": self.plan.bytes_held,
            "seconds_by_stage": self.seconds.compute(),
        }

    # -- The passes: probes are fitted in even ones, and read in odd ones

    def begin_pass(self, number: int) -> None:
        self.part, self.reading = self.plan.passes[number // 2], bool(number % 2)
        self.chosen_blocks = sorted({block for (block, _), _ in self.part})
        if self.reading:
            self.statistics.release()
        else:
            self.statistics.reset()

    def update(self, batch: Batch) -> None:
        with self._clock("forward"):
            sites = list(dict.fromkeys(site for (_, site), _ in self.part))
            recording = record(self.vit, batch.images, sites, blocks=self.chosen_blocks)
        rows = self.rows.to(batch.labels.device)[batch.labels]
        folds = torch.tensor([self.fold.get(i, 0) for i in batch.indices], device=rows.device)
        hidden = {place: recording[place[1]][place[0]] for place, _ in self.part}
        if self.reading:
            self._read(batch, hidden, rows, folds)
            if self.part is self.plan.passes[0]:
                right = recording.logits[:, self.classes].argmax(-1) == rows
                self.model.update(0, 0, right[:, None], self._one_each(right))
            return
        with self._clock("sums"):
            for index, (place, which) in enumerate(self.part):
                features = self._features(hidden[place][:, which])
                for fold in folds.unique().tolist():
                    mine = folds == fold
                    self.statistics.update(index, features[mine], rows[mine], fold)

    @staticmethod
    def _one_each(right: Tensor) -> Tensor:
        """Membership of one number an image: it counts as CLS."""
        members = torch.zeros(len(GROUPS), len(right), 1, dtype=torch.bool, device=right.device)
        members[0] = True
        return members

    def _features(self, tokens: Tensor) -> Tensor:
        return self.own.normalise(tokens) if self.variant == "corrected" else upcast(tokens)

    def end_pass(self, number: int) -> None:
        if self.reading:
            return
        for name in ("gram", "sums", "counts"):
            setattr(self.statistics, name, all_reduce(getattr(self.statistics, name)))
        with self._clock("solve"):
            left_out = [None] if self.folds == 1 else list(range(self.folds))
            weights, biases, final = [], [], []
            for index in range(len(self.part)):
                solved = [self.statistics.solve(index, without) for without in left_out]
                weights.append(torch.stack([weight.float() for weight, _ in solved]))
                biases.append(torch.stack([bias.float() for _, bias in solved]))
                if self.save_probes:
                    every = solved[0] if self.folds == 1 else self.statistics.solve(index)
                    final.append((every[0].float(), every[1].float()))
        held = self.fitted
        held.weight, held.bias = torch.stack(weights), torch.stack(biases)
        if final:
            both = zip(*final, strict=True)
            weight, bias = (torch.stack(list(tensors)) for tensors in both)
            held.all_weight = _joined(held.all_weight, weight)
            held.all_bias = _joined(held.all_bias, bias)

    def _read(
        self,
        batch: Batch,
        hidden: dict[tuple[int, str], Tensor],
        rows: Tensor,
        folds: Tensor,
    ) -> None:
        members = self.members(batch, max(tokens.shape[1] for tokens in hidden.values()))
        for index, (place, which) in enumerate(self.part):
            tokens = hidden[place][:, which]
            where, kind = self.places.index(place), self.tokens.index(which)
            some = members[:, :, : hidden[place].shape[1]][:, :, which]
            with self._clock("read_probes"):
                features = self._features(tokens)
                best = torch.empty(features.shape[:2], dtype=torch.int64, device=rows.device)
                for fold in folds.unique().tolist():
                    mine = folds == fold
                    weight = self.fitted.weight[index, fold].to(features)
                    bias = self.fitted.bias[index, fold].to(features)
                    best[mine] = (features[mine] @ weight.T + bias).argmax(-1)
                self.probe.update(where, kind, best == rows[:, None], some)
            with self._clock("read_projection"):
                best = self._project(place, hidden[place], which).argmax(-1)
                self.projection.update(where, kind, best == rows[:, None], some)

    def _project(self, place: tuple[int, str], tokens: Tensor, which: slice) -> Tensor:
        """Logits of the same classes by the class embedding, B×Q×K."""
        readout = self.readout.at(*place)
        if not isinstance(readout, ClassEmbedding) or len(readout.parts) > 1:
            return readout.project(tokens)[:, which][..., self.classes]
        head = readout.parts[0].head
        logits = readout.normalise(tokens[:, which]) @ head.weight[self.classes].T
        bias = head.offset()
        return logits if bias is None else logits + bias[self.classes]

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds.update(stage, self._now() - started)

    def _now(self) -> float:
        if self.vit.device.type == "cuda":
            torch.cuda.synchronize(self.vit.device)
        return time.perf_counter()

    # -- Results

    def tables(self) -> dict[str, list[Row]]:
        shares, counts, _, _ = self.model.compute()
        rows = [self.row("accuracy", shares[0, 0], counts[0, 0], (-1, ""))]
        for name, metric in (("probe", self.probe), ("projection", self.projection)):
            by_group, group_count, by_probe, probe_count = metric.compute()
            for index, place in enumerate(self.places):
                for (tokens, group), value, n in zip(
                    GROUPS, by_group[index], group_count[index], strict=True
                ):
                    if n > 0:
                        rows.append(self.row(f"{name}_accuracy", value, n, place, tokens, group))
                for kind, position in enumerate(self.positions or ()):
                    tokens = "image" if position >= self.vit.prefix_tokens else "cls"
                    metric_name = f"{name}_accuracy/position_{position}"
                    value, n = by_probe[index, kind], probe_count[index, kind]
                    rows.append(self.row(metric_name, value, n, place, tokens))
        if self.save_probes:
            self._write_probes()
        return {self.name.replace("-", "_"): rows}

    def _write_probes(self) -> None:
        """All classes of the model: those without images are constant, as ridge leaves them."""
        assert self.config.output is not None
        probes = [probe for part in self.plan.passes for probe in part]
        weight = self.fitted.all_weight
        shape = (len(probes), self.vit.num_classes)
        whole = weight.new_zeros(*shape, weight.shape[-1])
        bias = weight.new_full(shape, -1.0)
        whole[:, self.classes], bias[:, self.classes] = weight, self.fitted.all_bias
        heads = dict(stack_probes(probes, list(zip(whole, bias, strict=True))))
        normed = self.variant == "corrected"
        prefix = self.vit.prefix_tokens
        readout = LinearProbe(self.vit.readout, heads, prefix, self.positions, normed)
        write_atomically(self.config.output / "probes.safetensors", encode_readout(readout))

    def headline(self, tables: dict[str, list[Row]]) -> Sequence[Row]:
        (rows,) = tables.values()
        last = select(rows, block=self.depth - 1, site="resid_post", group="all")
        names = ("probe_accuracy", "projection_accuracy")
        return select(rows, metric="accuracy") + [row for row in last if row.metric in names]

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.studies.linear_probing.figure import draw

        (rows,) = tables.values()
        return draw(rows)


def _positions(given: str | None) -> list[int] | None:
    """None for none, an empty list for all."""
    if given is None or given == "all":
        return None if given is None else []
    try:
        chosen = list(dict.fromkeys(int(part) for part in given.split(",")))
    except ValueError:
        chosen = [-1]
    if min(chosen) < 0:
        raise InputError(f"positions {given!r} are no list like 0,17: give numbers, or all.")
    return chosen


def _joined(before: Tensor, more: Tensor) -> Tensor:
    return torch.cat([before.to(more), more]) if before.numel() else more
