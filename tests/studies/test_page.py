"""Pages say what their committed results say."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(params=["studies_page", "arena_page"])
def page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(request.param)


def test_tables_are_those_of_the_results(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, page.TABLES) == text
    number = re.search(r"\| (0\.\d{3}) \|", text)
    assert number is not None
    start, stop = number.span(1)
    changed = f"{text[:start]}9.999{text[stop:]}"
    assert page.written(changed, page.TABLES) == text


@pytest.mark.parametrize("page", ["studies_page"], indirect=True)
def test_figures_are_there(page: ModuleType) -> None:
    named = re.findall(r"\(figures/(vit_tiny_\w+\.png)\)", page.PAGE.read_text(encoding="utf-8"))
    drawn = {path.name for path in page.FIGURES.glob("vit_tiny_*.png")}
    assert set(named) == drawn and len(named) == len(drawn)


@pytest.mark.parametrize("page", ["studies_page"], indirect=True)
def test_results_are_of_one_model_and_one_dataset(page: ModuleType) -> None:
    runs = [json.loads(path.read_text()) for path in page.RESULTS.glob("*/run.json")]
    assert len(runs) == 5 and all(run["complete"] and run["images"] == 400 for run in runs)
    assert len({run["settings"]["weights"] for run in runs}) == 1
    assert len({run["settings"]["data"]["fingerprint"] for run in runs}) == 1
