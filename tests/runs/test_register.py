"""A study from outside the package is among those of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torchmetrics import MeanMetric

from captum_classemb.cli import cli
from captum_classemb.errors import InputError
from captum_classemb.runs import Row, Study, StudyConfig, read_rows, register_study, registry
from captum_classemb.runs.batches import Batch
from captum_classemb.studies import all_studies


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers what a test registers until it ends."""
    all_studies()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


class Brightness(Study):
    """How bright images are.

    Args:
        config: the model, which is not asked.
        scale: of the brightness.
    """

    name = "brightness"
    parameters = (click.Option(["--scale"], type=float, default=1.0),)

    def __init__(self, config: StudyConfig, scale: float) -> None:
        self.config, self.scale = config, scale
        self.metrics = nn.ModuleDict({"mean": MeanMetric()})

    def update(self, batch: Batch) -> None:
        mean: Any = self.metrics["mean"]
        mean.update(self.scale * batch.images.mean((1, 2, 3)))

    def tables(self) -> dict[str, list[Row]]:
        mean: Any = self.metrics["mean"]
        value = float(mean.compute())
        name, variant = self.config.name, self.config.variant
        return {self.name: [Row(self.name, name, -1, "", "", "all", variant, "mean", value, 4)]}


def test_it_is_listed_explained_and_run(tmp_path: Path) -> None:
    register_study(Brightness)
    assert all_studies()["brightness"] is Brightness
    runner = CliRunner()
    assert "brightness" in runner.invoke(cli, ["study", "--help"]).output
    told = runner.invoke(cli, ["study", "brightness", "--help"]).output
    assert "How bright images are." in told and "--scale" in told
    options = ["--model", "demo_vit", "--data", "scenes", "--limit", "4", "--scale", "2"]
    result = runner.invoke(
        cli, ["study", "brightness", *options, "--output", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    (row,) = read_rows(tmp_path / "out/brightness.csv")
    assert row.metric == "mean" and torch.isfinite(torch.tensor(row.value))


def test_a_name_is_needed_and_taken_once() -> None:
    register_study(Brightness)
    assert register_study(Brightness) is Brightness

    class Nameless(Brightness):
        name = ""

    class Other(Brightness):
        name = "identifiability"

    with pytest.raises(InputError, match="has no name"):
        register_study(Nameless)
    with pytest.raises(InputError, match="'identifiability' is registered already"):
        register_study(Other)
