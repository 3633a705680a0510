"""The loss about the trained weights: Hessian spectra, landscapes, optimisation trajectories."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from captum_classemb.dynamics.augmentation import augment as augmented
from captum_classemb.dynamics.hessian import Curvature, HessianSpectrum, density
from captum_classemb.dynamics.landscape import LossLandscape
from captum_classemb.dynamics.studies.dynamics_study import DynamicsStudy, numbers, one_axis
from captum_classemb.dynamics.trajectory import checkpoint_files, polar_trajectory
from captum_classemb.models.load import read_checkpoint
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DECAY = click.Option(
    ["--weight-decay"], type=click.FloatRange(min=0), default=1e-4,
    help="λ of the loss's λ/2·‖w‖².",
)  # fmt: skip
_AUGMENT = click.Option(
    ["--augment"], type=click.Choice(["flip-shift", "shift", "none"]), default="flip-shift",
    help="Shift the images by up to an eighth of their side, and mirror half of them.",
)  # fmt: skip
_COUNT = click.Option(
    ["--eigenvalues"], type=click.IntRange(min=1), default=5, help="Eigenvalues of each batch."
)


def _by_batch(eigenvalues: Tensor, count: int) -> Tensor:
    """Batches × eigenvalues; torchmetrics makes a scalar of a single number."""
    return eigenvalues.reshape(-1, count)


class LossStudy(DynamicsStudy):
    """A study of the training loss: of augmented images and with L2, as in the paper.

    Args:
        config: the model and how it is studied.
        augment: ``"flip-shift"``, ``"shift"`` or ``"none"``; a batch is augmented in the same way
            whichever process takes it, and for all weights that it is shown to.
        weight_decay: λ of the loss's λ/2·‖w‖².
    """

    def __init__(self, config: StudyConfig, augment: str, weight_decay: float) -> None:
        super().__init__(config)
        self.loss_settings = {"augment": augment, "weight_decay": weight_decay}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.loss_settings}

    def images(self, batch: Batch) -> Tensor:
        """The images of a batch, augmented."""
        how = self.loss_settings["augment"]
        if how == "none":
            return batch.images
        generator = torch.Generator().manual_seed(self.config.seed + batch.number)
        return augmented(batch.images, generator, flip=how == "flip-shift")


@register_study
class HessianStudy(LossStudy):
    """Largest eigenvalues of the loss Hessian batch by batch, share of negative ones, trace.

    The paper measures the training loss: give training images and the weight decay of the
    training. Every batch of ``--batch-size`` images has a Hessian of its own.
    """

    name = "hessian"
    variants = False
    parameters = (
        _COUNT,
        _DECAY,
        _AUGMENT,
        click.Option(
            ["--curvature"], type=click.Choice(["hessian", "ggn"]), default="hessian",
            help="The Hessian, or the Gauss–Newton matrix.",
        ),
    )  # fmt: skip

    def __init__(
        self,
        config: StudyConfig,
        eigenvalues: int = 5,
        weight_decay: float = 1e-4,
        augment: str = "flip-shift",
        curvature: Curvature = "hessian",
    ) -> None:
        super().__init__(config, augment, weight_decay)
        self.options: dict[str, Any] = {"count": eigenvalues, "curvature": curvature}
        self.spectrum = HessianSpectrum(
            **self.options, weight_decay=weight_decay, vectors=8, seed=config.seed,
        )  # fmt: skip
        self.metrics = nn.ModuleDict({"spectrum": self.spectrum})

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.options}

    def update(self, batch: Batch) -> None:
        self.spectrum.update(
            self.config.model, self.images(batch), batch.labels, number=batch.number
        )

    def rows(self) -> list[Row]:
        found = self.spectrum.compute()
        eigenvalues = _by_batch(found.eigenvalues, self.options["count"])
        batches = len(eigenvalues)
        rows = [
            self.row("negative_share", found.negative, eigenvalues.numel()),
            self.row("largest_eigenvalue", eigenvalues.amax(1).mean(), batches),
            self.row("trace", found.traces.mean(), batches),
        ]
        for i, values in enumerate(eigenvalues):
            rows += [self.row(f"eigenvalue@{i},{k}", v, 1) for k, v in enumerate(values)]
        return rows

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.dynamics.figures.landscapes import eigenvalue_density

        rows = tables["hessian"]
        values = torch.tensor([r.value for r in rows if r.metric.startswith("eigenvalue@")])
        if len(values.unique()) < 2:
            return {}
        margin = 0.15 * float(values.max() - values.min())
        points = torch.linspace(float(values.min()) - margin, float(values.max()) + margin, 400)
        figure, axis = one_axis()
        name = self.config.name
        heights = {name: density(values, points).numpy()}
        eigenvalue_density(axis, points.numpy(), heights, {name: values.numpy()})
        return {"hessian": figure}


@register_study
class LossLandscapeStudy(LossStudy):
    """Loss over a plane through the weights, along two filter-normalised random directions.

    Variants: ``"corrected"`` normalises each filter as Li et al. define it, along orthogonal
    directions; ``"paper"`` is what the published code computes.
    """

    name = "loss-landscape"
    parameters = (
        _DECAY,
        _AUGMENT,
        click.Option(["--points"], type=click.IntRange(min=2), default=11, help="Points a side."),
    )

    def __init__(
        self,
        config: StudyConfig,
        weight_decay: float = 1e-4,
        augment: str = "flip-shift",
        points: int = 11,
    ) -> None:
        super().__init__(config, augment, weight_decay)
        self.landscape = LossLandscape(
            config.model, points=points, weight_decay=weight_decay, variant=self.variant,
            seed=config.seed,
        )  # fmt: skip
        self.metrics = nn.ModuleDict({"landscape": self.landscape})

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "points": len(self.landscape.axis)}

    def update(self, batch: Batch) -> None:
        self.landscape.update(self.images(batch), batch.labels)

    def rows(self) -> list[Row]:
        plane = self.landscape
        loss = plane.compute()
        axis = plane.axis.tolist()
        return [
            self.row(f"loss@{a:.4g},{b:.4g}", loss[i, j], plane.images)
            for i, a in enumerate(axis)
            for j, b in enumerate(axis)
        ]

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        from captum_classemb.dynamics.figures.landscapes import landscape_contour, landscape_surface

        rows = tables["loss-landscape"]
        along = np.array(sorted({numbers(row.metric)[0] for row in rows}))
        loss = np.array([row.value for row in rows]).reshape(len(along), len(along))
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        landscape_surface(figure.add_subplot(1, 2, 1, projection="3d"), along, loss)
        landscape_contour(figure.add_subplot(1, 2, 2), along, loss)
        return {"loss-landscape": figure}

    def headline(self, tables: dict[str, list[Row]]) -> list[Row]:
        rows = tables["loss-landscape"]
        return [rows[len(rows) // 2], max(rows, key=lambda row: row.value)]


@register_study
class TrajectoryStudy(LossStudy):
    """Optimisation trajectory about the final weights, and the Hessian at each of its checkpoints.

    The checkpoints lie in one folder, numbered in their names; the last one is the final one.
    """

    name = "trajectory"
    variants = False
    parameters = (
        click.Option(
            ["--checkpoints"], type=click.Path(path_type=Path), required=True, metavar="DIR",
            help="Folder of the checkpoints.",
        ),
        _COUNT,
        _DECAY,
        _AUGMENT,
    )  # fmt: skip

    def __init__(
        self,
        config: StudyConfig,
        checkpoints: Path,
        eigenvalues: int = 5,
        weight_decay: float = 1e-4,
        augment: str = "flip-shift",
    ) -> None:
        super().__init__(config, augment, weight_decay)
        self.files = checkpoint_files(checkpoints)
        self.options: dict[str, Any] = {"count": eigenvalues}
        self.spectra = [
            HessianSpectrum(eigenvalues, weight_decay=weight_decay, seed=config.seed)
            for _ in self.files
        ]
        self.metrics = nn.ModuleDict({"spectra": nn.ModuleList(self.spectra)})
        self.model = copy.deepcopy(config.model)

    def settings(self) -> dict[str, Any]:
        names = [file.name for file in self.files]
        return {**super().settings(), **self.options, "checkpoints": names}

    def update(self, batch: Batch) -> None:
        self.model.to(batch.images.device)
        images = self.images(batch)
        for file, spectrum in zip(self.files, self.spectra, strict=True):
            self.model.load_state_dict(read_checkpoint(file))
            spectrum.update(self.model, images, batch.labels, number=batch.number)

    def rows(self) -> list[Row]:
        path = polar_trajectory([partial(read_checkpoint, file) for file in self.files])
        rows = []
        for i, spectrum in enumerate(self.spectra):
            found = spectrum.compute()
            eigenvalues = _by_batch(found.eigenvalues, self.options["count"])
            n = len(eigenvalues)
            rows += [
                self.row(f"radius@{i}", path.radius[i], 1),
                self.row(f"angle@{i}", path.angle[i], 1),
                self.row(f"largest_eigenvalue@{i}", eigenvalues.amax(1).mean(), n),
                self.row(f"negative_share@{i}", found.negative, eigenvalues.numel()),
            ]
        return rows

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        from captum_classemb.dynamics.figures.landscapes import by_epoch, polar_path

        def column(name: str) -> np.ndarray[Any, Any]:
            rows = tables["trajectory"]
            return np.array([row.value for row in rows if row.metric.startswith(f"{name}@")])

        figure, axis = one_axis((4.6, 4.4), "polar")
        polar_path(axis, {self.config.name: (column("radius"), column("angle"))})
        curvature, beside = one_axis()
        largest = column("largest_eigenvalue")
        lines = {self.config.name: (np.arange(len(largest), dtype=float), largest)}
        by_epoch(beside, lines, "largest eigenvalue of the loss Hessian")
        beside.set_xlabel("checkpoint")
        return {"trajectory": figure, "trajectory-hessian": curvature}
