"""The base class of studies."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from captum_classemb.runs.batches import Batch
from captum_classemb.runs.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captum_classemb.data import StudyDataset


class Study(ABC):
    """One experiment.

    All that a study accumulates lies in :attr:`metrics`, a module of ``torchmetrics.Metric``:
    they are what checkpoints hold and what the processes of a distributed run add up. A subclass
    with a :attr:`name` in a file of this package appears in the command line by itself.

    Attributes:
        name: what the command line calls it; empty for a base class.
        parameters: click parameters that are passed to the constructor by name, beside those
            that all studies have.
        trains: whether something is fitted, so that a training set can be named; a dataset then
            comes with its own, if it has one, as :class:`~captum_classemb.data.TrainAndTest`.
        labelled: whether it needs to know what each image shows.
        variants: whether the paper's code and text differ on anything it measures.
        compares: whether its figures show other runs of it beside its own.
        metrics: the accumulators.
    """

    name: ClassVar[str] = ""
    parameters: ClassVar[tuple[Any, ...]] = ()
    trains: ClassVar[bool] = False
    labelled: ClassVar[bool] = True
    variants: ClassVar[bool] = True
    compares: ClassVar[bool] = False
    metrics: nn.ModuleDict

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the study's documentation."""
        return inspect.cleandoc(cls.__doc__ or "").split("\n\n", 1)[0].replace("\n", " ")

    def settings(self) -> dict[str, Any]:
        """What distinguishes this run from others of the same study, in terms of JSON.

        A run is resumed only with the same settings.
        """
        return {}

    def passes(self, data: StudyDataset, images: Sequence[int]) -> list[Sequence[int]]:
        """Which images are read, in order: one pass over all that were chosen, unless overridden.

        Args:
            data: the dataset.
            images: those that the run takes.
        """
        return [images]

    def begin_pass(self, number: int) -> None:
        """Called before each pass, and before the sums of an interrupted one are restored."""
        return

    def end_pass(self, number: int) -> None:
        """Called after each pass but the last, on all processes at once."""
        return

    def notices(self) -> list[str]:
        """Sentences that are said before the run starts and kept in ``run.json``."""
        return []

    def notes(self) -> dict[str, Any]:
        """What ``run.json`` says of the run beside settings; called once, on every process."""
        return {}

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take a batch into the sums; called under ``torch.no_grad``."""

    @abstractmethod
    def tables(self) -> dict[str, list[Row]]:
        """The results by table name; called once, on every process of a distributed run."""

    def figures(self, tables: dict[str, list[Row]]) -> dict[str, Figure]:
        """Figures by name, drawn from the tables alone."""
        return {}

    def headline(self, tables: dict[str, list[Row]]) -> Sequence[Row]:
        """The few rows that the terminal shows."""
        return [row for rows in tables.values() for row in rows][:8]
