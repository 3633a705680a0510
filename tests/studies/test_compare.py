"""Several runs in one figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from squares import QUIET, Squares, small_vit

from captum_classemb.errors import OutputError
from captum_classemb.runs import StudyConfig, run_study, select
from captum_classemb.studies.identifiability.study import IdentifiabilityStudy
from captum_classemb.studies.memories.study import MemoriesStudy


def test_runs_are_drawn_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Figure] = {}

    class Watched(IdentifiabilityStudy):
        def figures(self, tables):  # type: ignore[no-untyped-def]
            drawn.update(super().figures(tables))
            return drawn

    data = Squares()
    deep = IdentifiabilityStudy(StudyConfig(small_vit(depth=4), "deep"))
    other = run_study(deep, data, tmp_path / "deep", QUIET).tables["identifiability"]
    options = replace(QUIET, compare=[tmp_path / "deep"])
    study = Watched(StudyConfig(small_vit(), "shallow"))
    own = run_study(study, data, tmp_path / "shallow", options).tables["identifiability"]
    assert {row.model for row in own} == {"shallow"}
    axes = drawn["identifiability"].axes
    # Three metrics for CLS, image, class and context tokens.
    assert len([axis for axis in axes if axis.lines]) == 12
    axis = next(a for a in axes if a.get_title() == "identifiability\nimage tokens")
    assert axis.get_xlabel() == "share of the blocks"
    fields = {"metric": "class_identifiability", "site": "resid_post", "tokens": "image"}
    for line, rows, depth in zip(axis.lines, (own, other), (3, 4), strict=True):
        chosen = select(rows, **fields, group="all")
        assert line.get_ydata() == pytest.approx([row.value for row in chosen])
        assert line.get_xdata() == pytest.approx([(b + 1) / depth for b in range(depth)])
    drawn.clear()
    # A complete run is drawn again with others, and nothing else is done.
    before = (tmp_path / "shallow" / "identifiability.png").read_bytes()
    again = replace(QUIET, resume=True)
    run_study(study, data, tmp_path / "shallow", again)
    assert not drawn
    run_study(study, data, tmp_path / "shallow", replace(again, compare=options.compare))
    assert (tmp_path / "shallow" / "identifiability.png").read_bytes() == before and drawn


class Alone(IdentifiabilityStudy):
    """A study whose figures show one run."""

    name, compares = "alone", False


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    data = Squares()
    config = StudyConfig(small_vit(), "small")
    run_study(IdentifiabilityStudy(config), data, tmp_path / "one", QUIET)
    options = replace(QUIET, compare=[tmp_path / "one"])
    with pytest.raises(OutputError, match="no complete run of the study memories"):
        run_study(MemoriesStudy(config), data, tmp_path / "two", options)
    assert not (tmp_path / "two").exists()
    with pytest.raises(OutputError, match="show one run"):
        run_study(Alone(config), data, tmp_path / "two", options)
    with pytest.raises(OutputError, match="damaged or of another version"):
        run_study(
            IdentifiabilityStudy(config), data, tmp_path / "two",
            replace(QUIET, compare=[tmp_path / "nothing"]),
        )  # fmt: skip
