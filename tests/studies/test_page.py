"""The page of the small model says what its committed results say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "studies_page.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("studies_page", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text) == text
    assert page.written(text.replace("0.818", "0.918")) == text.replace("0.818", "0.918").replace(
        "| 0.918 |", "| 0.818 |"
    )


def test_figures_are_there(page: ModuleType) -> None:
    named = re.findall(r"\(figures/(vit_tiny_\w+\.png)\)", page.PAGE.read_text(encoding="utf-8"))
    drawn = {path.name for path in page.FIGURES.glob("vit_tiny_*.png")}
    assert set(named) == drawn and len(named) == len(drawn)


def test_results_are_of_one_model_and_one_dataset(page: ModuleType) -> None:
    runs = [json.loads(path.read_text()) for path in page.RESULTS.glob("*/run.json")]
    assert len(runs) == 5 and all(run["complete"] and run["images"] == 400 for run in runs)
    assert len({run["settings"]["weights"] for run in runs}) == 1
    assert len({run["settings"]["data"]["fingerprint"] for run in runs}) == 1
