"""What the explorer's page is told: the library's own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pages import unpacked

from captum_classemb.attr import METHODS, ClassEmbeddingProjection
from captum_classemb.cli import cli
from captum_classemb.data import Preprocess, read_image
from captum_classemb.explain import Explore
from captum_classemb.explain.compute import OWN
from captum_classemb.explorer.page import ExplorerPage
from captum_classemb.models import class_names, demo_image_paths, demo_vit, load_model
from captum_classemb.vit import adapt

IMAGE = demo_image_paths()[0]


def work(name: str, **options: object) -> Explore:
    model = demo_vit() if name == "demo_vit" else load_model(name, random_init=True)
    preprocess = Preprocess.of_model(model)
    run = Explore(adapt(model), preprocess.view(read_image(IMAGE)), preprocess, **options)
    for step in run.steps([3]):
        step()
    return run


def test_targets_come_first_then_the_top_classes() -> None:
    run = work("demo_vit")
    assert run.focus[0] == 3
    assert set(run.focus) == {3, *run.top}
    assert list(run.top) == list(np.argsort(-run.probabilities, kind="stable")[:5])


@pytest.mark.parametrize(
    ("name", "tokens"), [("test_vit2", 101), ("deit_tiny_distilled_patch16_224", 198)]
)
def test_other_families(name: str, tokens: int) -> None:
    """One that averages its patches behind a register; a distilled one, which reads two tokens."""
    run = work(name, methods=("memory-patch-importance",))
    page = run.page(class_names(run.vit.model), title="", model=name)
    facts, arrays = unpacked(page)
    assert arrays["ranks"].shape[-1] == tokens
    assert len(facts["prefix"]) == run.vit.prefix_tokens
    assert [method["key"] for method in facts["methods"]] == ["memory-patch-importance"]
    assert facts["hasLedger"]


def test_numbers_are_those_of_the_attributions() -> None:
    run = work("demo_vit")
    facts, arrays = unpacked(run.page(class_names(run.vit.model), title="", model=""))
    inputs = run.preprocess.tensor(run.view)[None]
    for key in OWN:
        attribution = METHODS[key].build(run.vit)
        zero = next(entry for entry in facts["methods"] if entry["key"] == key)
        step = arrays[f"{key}.mapSteps"][:, None, None]
        shown = (arrays[f"{key}.maps"].astype(float) - zero["mapsZero"]) * step
        classes = arrays[f"{key}.classes"].tolist()
        # Many classes of all paths would take long.
        few = key == "all-path-importance"
        assert sorted(classes) == (sorted(run.focus) if few else list(range(10)))
        expected = attribution.attribute_classes(inputs, classes)[0].numpy()
        assert (np.abs(shown - expected) <= 0.51 * step).all()
        parts = (arrays[f"{key}.parts"].astype(float) - zero["partsZero"]) * arrays[
            f"{key}.partSteps"
        ][..., None, None]
        target = torch.tensor([run.focus[0]])
        if key == "class-embedding-projection":
            blocks = [ClassEmbeddingProjection(run.vit, block=b) for b in range(6)]
            expected = torch.cat([each.attribute_patches(inputs, target) for each in blocks])
            half = 0.51 * arrays[f"{key}.partSteps"][0, ..., None, None]
            assert (np.abs(parts[0] - expected.numpy()) <= half).all()
        elif not attribution.by_head:
            expected = attribution.attribute_patches(inputs, target)[0].numpy()
            half = 0.51 * arrays[f"{key}.partSteps"][0, ..., None, None]
            assert (np.abs(parts[0] - expected) <= half).all()
        else:
            expected = attribution.attribute_patches(inputs, target)[0].numpy()
            half = 0.51 * arrays[f"{key}.partSteps"][0, :, 1:, None, None]
            assert (np.abs(parts[0, :, 1:] - expected) <= half).all()
            half = 0.51 * arrays[f"{key}.partSteps"][0, :, 0, None, None]
            assert (np.abs(parts[0, :, 0] - expected.sum(1)) <= half).all()


def test_ledger_adds_up() -> None:
    ledger = work("demo_vit")._ledger
    assert ledger is not None
    parts = [ledger.patches.sum(1), ledger.prefix.sum((1, 2)), ledger.mlp.sum(1)]
    total = sum(parts) + ledger.embedding + ledger.bias + ledger.pool
    np.testing.assert_allclose(total, ledger.score, atol=1e-3)
    np.testing.assert_allclose(ledger.heads.sum((1, 2)), ledger.patches.sum(1), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((str(IMAGE), str(demo_image_paths()[1])), "2 images were given"),
        (("nowhere.png",), "does not exist"),
    ],
)
def test_a_page_is_of_one_image(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = CliRunner().invoke(cli, ["explain", *arguments, "--html", str(page)])
    assert result.exit_code == 2
    assert words in result.output
    assert not page.exists()


def test_command_writes_the_page_alone(tmp_path: Path) -> None:
    page = tmp_path / "made" / "page.html"
    words = [
        "explain",
        "--html",
        str(page),
        "--target",
        "one",
        "--method",
        "memory-patch-importance",
    ]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    head, row = result.output.splitlines()
    assert head.split() == ["image", "top", "class", "explained", "page"]
    assert row.split()[-2:] == ["one", str(page)]
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    facts, _ = unpacked(ExplorerPage(page.read_text()))
    assert facts["focus"][0] == 1
    assert [method["key"] for method in facts["methods"]] == ["memory-patch-importance"]
    assert CliRunner().invoke(cli, [*words, "--quiet"]).output == ""
