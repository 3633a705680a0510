"""What the studies of *How Do Vision Transformers Work?* have in common: any vision model."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import Tensor, nn

from captum_classemb.data import data_config
from captum_classemb.errors import InputError
from captum_classemb.functional.variant import Variant, check_variant
from captum_classemb.models.load import load_model
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.study import Study
from captum_classemb.runs.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Parameters of studies that compare with a second model.
OTHER_MODEL = (
    click.Option(["--other"], metavar="NAME", help="A second model, as for --model."),
    click.Option(
        ["--other-checkpoint"], type=click.Path(path_type=Path), metavar="FILE",
        help="Weights for it.",
    ),
)  # fmt: skip


class DynamicsStudy(Study):
    """A study of any vision model with logits, CNNs and hierarchical models included.

    In its table ``site`` is the kind of a step (``embedding``, ``attention``, ``mlp``,
    ``convolution``, ``pooling``, ``block``), and ``block`` counts the model's blocks.

    Args:
        config: the model and how it is studied.

    Raises:
        InputError: for an unknown variant, and for one that the study does not have.
    """

    def __init__(self, config: StudyConfig) -> None:
        check_variant(config.variant)
        if config.variant != "corrected" and not self.variants:
            raise InputError(
                f"the study {self.name} has no variant {config.variant!r}, since paper and code "
                "agree on it: leave the variant out."
            )
        self.config = config
        self.variant: Variant = config.variant

    def settings(self) -> dict[str, Any]:
        return self.config.settings()

    @abstractmethod
    def rows(self) -> list[Row]:
        """The rows of the table, of the images that all processes saw."""

    def tables(self) -> dict[str, list[Row]]:
        return {self.name: self.rows()}

    def example(self) -> Tensor:
        """An image of the model's size, 1×3×H×W, to find its steps with."""
        size = data_config(self.config.model)["input_size"]
        return torch.zeros(1, *size, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.config.model.parameters()).device

    def row(
        self, metric: str, value: Tensor | float, n: Tensor | float, block: int = -1, site: str = ""
    ) -> Row:
        """One row of the table."""
        return Row(
            self.name, self.config.name, block, site, "image", "all", self.variant, metric,
            float(value), int(n),
        )  # fmt: skip


class OtherModel(nn.Module):
    """A second model that reads the images of the first one, normalised for itself.

    Args:
        config: the first model.
        name: of the second one, as for :func:`captum_classemb.models.load_model`.
        checkpoint: its weights.

    Raises:
        InputError: if the two read images of different sizes.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: StudyConfig, name: str, checkpoint: Path | None = None) -> None:
        super().__init__()
        self.model = load_model(name, checkpoint)
        first, second = data_config(config.model), data_config(self.model)
        if first["input_size"] != second["input_size"]:
            sizes = ["×".join(map(str, c["input_size"])) for c in (first, second)]
            raise InputError(
                f"Both models must read the same images, but {config.name} reads {sizes[0]} and "
                f"{name} {sizes[1]}."
            )
        mean, std, other_mean, other_std = (
            torch.tensor(c[key])[:, None, None] for c in (first, second) for key in ("mean", "std")
        )
        self.register_buffer("scale", std / other_std, persistent=False)
        self.register_buffer("shift", (mean - other_mean) / other_std, persistent=False)
        self.to(next(config.model.parameters()).device).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits B×C of B×3×H×W, normalised for the first model."""
        logits: Tensor = self.model(images * self.scale + self.shift)
        return logits


def numbers(metric: str) -> list[float]:
    """The coordinates that a metric's name holds after its @.

    Examples:
        >>> numbers("loss@-0.5,1")
        [-0.5, 1.0]
    """
    return [float(part) for part in metric.rpartition("@")[2].split(",")]


def one_axis(
    size: tuple[float, float] = (6.4, 3.8), projection: str | None = None
) -> tuple[Figure, Any]:
    """A figure of one axis, without touching pyplot's state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot(projection=projection)
