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


def test_costs_in_the_readme_are_those_of_the_results() -> None:
    root = BENCHMARKS.parent
    results = json.loads((BENCHMARKS / "results" / "attribution_speed_cpu.json").read_text())
    measured = {name: cost["ratio"] for name, cost in results["methods"].items()}
    del measured["forward (inference_mode)"]
    table = (root / "README.md").read_text(encoding="utf-8").split("| method | × forward |")[1]
    shown = re.findall(r"\| ([\d.]+) \|$", table.split("\n\n")[0], re.MULTILINE)
    assert sorted(shown) == sorted(f"{x:.2f}" if x < 10 else f"{x:.1f}" for x in measured.values())
    own = f"{measured['PatchImportance.attribute']:.2f} forward passes"
    page = (root / "docs" / "arena.md").read_text(encoding="utf-8")
    assert own in " ".join(page.split())


@pytest.mark.parametrize("page", ["arena_page"], indirect=True)
def test_what_the_arena_says_in_words_holds(page: ModuleType) -> None:
    photographs, scenes = page.methods(page.PHOTOGRAPHS), page.methods(page.SCENES)
    assert next(iter(photographs)) == next(iter(scenes)) == "PatchImportance"
    curves = [
        f"pixels_{fill}/{m}/gap" for fill in ("mean", "blur") for m in ("accuracy", "probability")
    ]
    for measure in (*curves, "tokens_predicted/accuracy/gap", "localisation/energy"):
        best = max(photographs, key=lambda name: page.mean(photographs[name], measure))
        assert best == "PatchImportance", measure
    context = "localisation/context_share"
    assert min(scenes, key=lambda n: page.mean(scenes[n], context)) == "PatchImportance"
    for better in ("attention rollout", "Chefer relevance"):
        for measure in ("localisation/average_precision", "localisation/pointing"):
            ours = page.mean(scenes["PatchImportance"], measure)
            assert page.mean(scenes[better], measure) > ours
