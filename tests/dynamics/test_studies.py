"""The dynamics studies end to end: tables against the metrics, figures, resuming, CNNs too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dynamics.small_models import (
    IMAGES,
    OPTIONS,
    Noise,
    cnn,
    every_study,
    save_checkpoints,
    vit,
    whole,
)

from captum_classemb.dynamics.fourier import FourierAmplitude
from captum_classemb.dynamics.hessian import top_eigenvalues
from captum_classemb.dynamics.studies.curvature import HessianStudy, TrajectoryStudy
from captum_classemb.dynamics.studies.fourier_and_variance import FourierStudy
from captum_classemb.dynamics.tracing.traced_steps import find_steps, record_steps
from captum_classemb.errors import InputError
from captum_classemb.runs import StudyConfig, read_rows, run_study, select
from captum_classemb.studies import all_studies


def test_all_are_registered() -> None:
    names = "cka fourier frequency-noise hessian lesion loss-landscape robustness trajectory"
    assert set(names.split()) | {"variance"} <= set(all_studies())


@pytest.mark.parametrize("make", [vit, cnn])
def test_every_study_runs_on_vits_and_cnns(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    save_checkpoints(model, tmp_path, (2.0, 1.5, 1.0))
    for make_study in every_study(model, tmp_path):
        study = make_study()
        result = run_study(study, Noise(), tmp_path / study.name, OPTIONS, torch.device("cpu"))
        rows = result.tables[study.name]
        assert rows == read_rows(tmp_path / study.name / f"{study.name}.csv")
        assert rows and all(row.value == row.value for row in rows)
        assert list((tmp_path / study.name).glob("*.png"))
        assert study.headline(result.tables)


def test_fourier_table_is_the_metric() -> None:
    model = vit()
    study = FourierStudy(StudyConfig(model, "small", variant="paper"))
    images, _ = whole()
    steps = find_steps(model, images)
    metric = FourierAmplitude("paper")
    metric.update(record_steps(model, images, steps)[1])
    study.depth.update(images)
    rows = [r for r in study.tables()["fourier"] if (r.block, r.site) == (0, "attention")]
    assert [r.value for r in rows] == pytest.approx(metric.compute().tolist())
    assert [r.metric for r in rows] == ["delta_log_amplitude@0.0000", "delta_log_amplitude@1.5708"]
    assert {r.n for r in rows} == {IMAGES}


def test_hessian_table_is_by_batch(tmp_path: Path) -> None:
    model = vit()
    study = HessianStudy(StudyConfig(model, "small"), eigenvalues=2, augment="none")
    result = run_study(study, Noise(), tmp_path, OPTIONS, torch.device("cpu"))
    images, labels = whole()
    expected = top_eigenvalues(model, images[5:], labels[5:], 2, weight_decay=1e-4)
    rows = result.tables["hessian"]
    found = [select(rows, metric=f"eigenvalue@1,{k}")[0].value for k in range(2)]
    assert found == pytest.approx(expected.tolist(), rel=1e-2)


def test_trajectory_on_a_line(tmp_path: Path) -> None:
    model = vit()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    save_checkpoints(model, tmp_path, (3.0, 2.0, 1.0))
    study = TrajectoryStudy(StudyConfig(model, "small"), tmp_path, eigenvalues=1)
    result = run_study(study, Noise(), tmp_path / "out", OPTIONS, torch.device("cpu"))
    radii = [r.value for r in result.tables["trajectory"] if r.metric.startswith("radius")]
    assert radii == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    torch.testing.assert_close(dict(model.state_dict()), weights)


def test_variants_that_a_study_does_not_have_are_refused() -> None:
    for name, study in all_studies().items():
        config = StudyConfig(vit(), "small", variant="paper")
        if not study.variants:
            with pytest.raises(InputError, match=f"{name} has no variant 'paper'"):
                study(config, **({"checkpoints": []} if name == "trajectory" else {}))  # type: ignore
    without = {name for name, study in all_studies().items() if not study.variants}
    names = {"robustness", "hessian", "trajectory", "frequency-noise", "lesion", "cka"}
    assert without == names
