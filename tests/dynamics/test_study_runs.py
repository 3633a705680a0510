"""Runs of the dynamics studies: any architecture and released folders from the command line,
interrupted, and in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from dynamics.small_models import Noise, every_study, save_checkpoints, vit
from PIL import Image
from released import cifar_c, imagenet_c

from captum_classemb.cli import cli
from captum_classemb.data import Preprocess, data_config, open_dataset
from captum_classemb.dynamics.robustness import Robustness
from captum_classemb.dynamics.studies.dynamics_study import OtherModel
from captum_classemb.models import demo_vit
from captum_classemb.runs import Row, RunOptions, Study, StudyConfig, read_rows, run_study, select

QUIET = RunOptions(batch_size=4, checkpoint_every=4, progress=False)


def study(name: str, data: Path, output: Path, *words: str) -> list[Row]:
    arguments = ["study", name, "--data", str(data), "--output", str(output), "--quiet", *words]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return read_rows(output / f"{name}.csv")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for label in ("0", "1"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        noise = Image.effect_noise((40, 40), 60).convert("RGB")
        noise.save(tmp_path / "pictures" / label / "1.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        ("resnet18", {"convolution": 5, "pooling": 3}),
        ("convnext_atto", {"convolution": 12, "pooling": 3}),
        ("swin_tiny_patch4_window7_224", {"attention": 12, "mlp": 12, "pooling": 3}),
        ("alternet_18", {"convolution": 2, "attention": 3, "pooling": 3}),
    ],
)
def test_models_that_are_no_plain_vit(
    model: str, steps: dict[str, int], pictures: Path, tmp_path: Path
) -> None:
    words = ("--model", model, "--random-init")
    rows = study("fourier", pictures, tmp_path / "out", *words)
    values = select(rows, metric="delta_log_amplitude@0.0000")
    kinds = [row.site for row in values]
    assert kinds[0] == "embedding"
    assert {kind: kinds.count(kind) for kind in kinds[1:]} == steps
    assert {row.n for row in values} == {2}
    assert (tmp_path / "out" / "fourier.png").is_file()


def test_cifar_c_is_measured_corruption_by_corruption(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    cifar_c(tmp_path / "data")
    words = ("--model", "demo_vit", "--batch-size", "4")
    rows = study("robustness", tmp_path / "data", tmp_path / "out", *words)
    assert (tmp_path / "out" / "robustness.png").is_file()
    model = demo_vit()
    data = open_dataset(tmp_path / "data", Preprocess.from_config(data_config(model)))
    accuracies = []
    for corruption, start in (("snow", 0), ("fog", 15)):
        for severity in range(1, 6):
            samples = [data[start + 3 * (severity - 1) + i] for i in range(3)]
            metric = Robustness()
            labels = torch.tensor([s.label for s in samples])
            metric.update(model, torch.stack([s.image for s in samples]), labels)
            for measure, value in metric.compute()._asdict().items():
                (row,) = select(rows, metric=f"{corruption}_{measure}@{severity}")
                assert row.value == pytest.approx(float(value), rel=1e-4, abs=1e-6)
                assert row.n == 3
            accuracies.append(float(metric.compute().accuracy))
    (mean,) = select(rows, metric="corrupted_accuracy")
    assert (mean.value, mean.n) == (pytest.approx(sum(accuracies) / 10), 30)
    assert not [row for row in rows if row.metric.startswith(("clean", "subset"))]


def test_imagenet_c(tmp_path: Path) -> None:
    imagenet_c(tmp_path / "data", "weather")
    words = ("--model", "test_vit", "--random-init")
    rows = study("robustness", tmp_path / "data", tmp_path / "out", *words)
    accuracies = [row for row in rows if row.metric.startswith("fog_accuracy@")]
    assert [row.metric[-1] for row in accuracies] == list("12345")
    assert {row.n for row in accuracies} == {2}


def test_clean_images_are_corrupted_on_the_fly(pictures: Path, tmp_path: Path) -> None:
    words = ("--model", "test_vit", "--random-init")
    rows = study("robustness", pictures, tmp_path / "out", *words)
    metrics = [row.metric for row in rows]
    assert metrics[:3] == ["clean_accuracy@0", "clean_nll@0", "clean_ece@0"]
    assert sum(metric.startswith("subset_") for metric in metrics) == 6 * 5 * 3


def test_two_models_under_noise(pictures: Path, tmp_path: Path) -> None:
    words = ("--model", "demo_vit", "--other", "demo_vit", "--bands", "2")
    rows = study("frequency-noise", pictures, tmp_path / "out", *words)
    first, second = (select(rows, model=name) for name in ("demo_vit", "demo_vit (other)"))
    assert len(first) == 3
    assert [row.value for row in first] == [row.value for row in second]


def test_another_model_gets_the_pixels_that_the_first_one_sees() -> None:
    first = torch.nn.Conv2d(3, 1, 1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    first.pretrained_cfg = {"input_size": (3, 64, 64), "mean": mean, "std": std}
    other = OtherModel(StudyConfig(first, "first"), "demo_vit")
    pixels = torch.rand(2, 3, 64, 64)
    seen = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(other(seen), demo_vit()(2 * pixels - 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["cka", "frequency-noise"])
def test_models_of_different_sizes_cannot_be_compared(
    name: str, pictures: Path, tmp_path: Path
) -> None:
    words = ["study", name, "--model", "test_vit", "--random-init", "--other", "demo_vit"]
    words += ["--data", str(pictures), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert "reads 3×160×160 and demo_vit 3×64×64" in result.output


class StopError(Exception):
    """Ends a run as if it had been killed."""


def stop_after_the_first_batch(made: Study) -> Study:
    update = made.update

    def stopping(batch: Any) -> None:
        if batch.number:
            raise StopError
        update(batch)

    made.update = stopping  # type: ignore[method-assign]
    return made


def test_all_go_on_where_they_stopped(tmp_path: Path) -> None:
    model = vit()
    save_checkpoints(model, tmp_path / "checkpoints", (2.0, 1.0))
    go_on = RunOptions(batch_size=4, checkpoint_every=4, progress=False, resume=True)
    make: Callable[[], Study]
    for make in every_study(model, tmp_path / "checkpoints"):
        name = make().name
        with pytest.raises(StopError):
            run_study(stop_after_the_first_batch(make()), Noise(), tmp_path / "cut" / name, QUIET)
        assert list((tmp_path / "cut" / name / "checkpoints").iterdir())
        run_study(make(), Noise(), tmp_path / "cut" / name, go_on)
        run_study(make(), Noise(), tmp_path / "whole" / name, QUIET)
        tables = [(tmp_path / run / name / f"{name}.csv").read_bytes() for run in ("cut", "whole")]
        assert tables[0] == tables[1]


@pytest.mark.slow
def test_two_processes_give_the_same_tables(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vit()
    for run in ("one", "two"):
        save_checkpoints(model, tmp_path / run / "checkpoints", (2.0, 1.0))
    program = str(Path(__file__).with_name("small_models.py"))
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests.parent, tests)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for run, start in (("one", []), ("two", launcher)):
        subprocess.run(
            [sys.executable, *start, program, str(tmp_path / run)],
            check=True, timeout=180, env=environment,
        )  # fmt: skip
    for make in every_study(model, tmp_path / "one" / "checkpoints"):
        name = make().name
        one, two = (read_rows(tmp_path / run / name / f"{name}.csv") for run in ("one", "two"))
        assert [row._replace(value=0.0) for row in one] == [row._replace(value=0.0) for row in two]
        assert [row.value for row in two] == pytest.approx([row.value for row in one], rel=1e-5)
