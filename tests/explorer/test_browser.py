"""The page in a real browser: it loads silently, and what is chosen changes what is shown."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import noise

from captum_classemb.attr import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.data import Preprocess, read_image
from captum_classemb.explain import explore
from captum_classemb.explorer import explorer_page
from captum_classemb.models import DEMO_CLASSES, demo_image_paths, demo_vit
from captum_classemb.vit import adapt, record

playwright = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")

IMAGE = demo_image_paths()[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    explore(demo_vit(), IMAGE, ["seven", "one"]).save(path)
    return path


def opened(browser: Any, file: Path, **options: Any) -> Any:
    """The page in a tab without network, which notes whatever the console says."""
    context = browser.new_context(offline=True, **options)
    tab = context.new_page()
    tab.said = []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.goto(file.as_uri())
    tab.wait_for_selector("html[data-ready]", timeout=20_000)
    return tab


@pytest.fixture
def tab(browser: Any, file: Path) -> Iterator[Any]:
    page = opened(browser, file, viewport={"width": 1280, "height": 900})
    yield page
    page.context.close()
    assert page.said == []


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    preprocess = Preprocess.of_model(demo_vit())
    return preprocess.tensor(preprocess.view(read_image(IMAGE)))[None]


def number(text: str) -> float:
    raised = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")
    return float(text.replace("·10", "e").translate(raised))


def shown_score(tab: Any) -> tuple[float, float]:
    """The score of the patch that is read, and how precise the page says it is."""
    match = re.search(r": (\S+) \(± (\S+)\)", tab.inner_text("#score"))
    assert match
    return number(match[1]), number(match[2])


def drag(tab: Any, block: int) -> None:
    tab.locator("#block").fill(str(block))


def point_at(tab: Any, row: int, column: int, act: str = "hover") -> None:
    box = tab.locator("#canvas").bounding_box()
    place = {"x": (column + 0.5) * box["width"] / 8, "y": (row + 0.5) * box["height"] / 8}
    getattr(tab.locator("#stage"), act)(position=place)


def picture(tab: Any) -> str:
    return str(tab.evaluate("document.getElementById('canvas').toDataURL()"))


def choose(tab: Any, title: str) -> None:
    tab.get_by_role("radio", name=title, exact=True).click()


def test_it_says_what_it_shows(tab: Any) -> None:
    assert tab.inner_text("#title") == IMAGE.name
    assert "seven" in tab.inner_text("#summary")
    assert tab.locator("#waterfall rect").count() > 0


@pytest.mark.parametrize(
    ("title", "method"),
    [
        ("patch-importance", PatchImportance),
        ("class-embedding-gradient", ClassEmbeddingGradient),
        ("memory-patch-importance", MemoryPatchImportance),
        ("class-embedding-projection", ClassEmbeddingProjection),
    ],
)
def test_scores_are_those_of_the_library(
    title: str, method: Any, tab: Any, inputs: torch.Tensor
) -> None:
    """All blocks together, one block, one of its heads; two classes."""
    attribution = method(demo_vit())
    choose(tab, title)
    for name in ("seven", "one"):
        target = DEMO_CLASSES.index(name)
        tab.locator("#class").fill(name)
        tab.locator("#class").press("Enter")
        tab.keyboard.press("Escape")
        if tab.get_attribute("#all", "aria-pressed") == "false":
            tab.click("#all")
        point_at(tab, 3, 4, "click")
        value, half = shown_score(tab)
        expected = attribution.attribute_classes(inputs, [target])[0, 0, 3, 4]
        assert value == pytest.approx(float(expected), abs=1.01 * half, rel=0.006)
        if method is ClassEmbeddingProjection:
            continue
        parts = attribution.attribute_patches(inputs, target)[0, 2, :, 3, 4]
        drag(tab, 2)
        value, half = shown_score(tab)
        assert value == pytest.approx(float(parts.sum()), abs=1.01 * half, rel=0.006)
        tab.select_option("#head", "2")
        value, half = shown_score(tab)
        assert value == pytest.approx(float(parts[1]), abs=1.01 * half, rel=0.006)


def test_slider_changes_map_and_top_classes(tab: Any, inputs: torch.Tensor) -> None:
    vit = adapt(demo_vit())
    hidden = record(vit, inputs, ["resid_post"])["resid_post"]
    point_at(tab, 5, 1, "click")
    seen = set()
    for block in (0, 3):
        drag(tab, block)
        assert tab.inner_text("#where") == f"block {block}"
        share = vit.readout.project(hidden[block])[0, 1 + 5 * 8 + 1].softmax(-1)
        best = share.argsort(descending=True)[:5].tolist()
        names = tab.locator("#top .name").all_inner_texts()
        assert names == [DEMO_CLASSES[index] for index in best]
        assert tab.locator("#top .share").first.inner_text() == f"{100 * share.max():.1f} %"
        seen.add(picture(tab))
    assert len(seen) == 2


def test_pointer_reads_and_click_keeps(tab: Any) -> None:
    point_at(tab, 1, 1, "click")
    tab.hover("#title")
    assert tab.inner_text("#token") == "Patch in row 2, column 2"
    history = tab.inner_html("#history")
    point_at(tab, 6, 3)
    assert tab.inner_text("#token") == "Patch in row 7, column 4"
    assert tab.inner_html("#history") != history
    tab.hover("#title")
    assert tab.inner_text("#token") == "Patch in row 2, column 2"


def test_keys_move_and_step(tab: Any) -> None:
    point_at(tab, 1, 1, "click")
    tab.focus("#stage")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "["):
        tab.keyboard.press(key)
    assert tab.inner_text("#token") == "Patch in row 4, column 3"
    assert tab.inner_text("#where") == "block 4"
    tab.keyboard.press("a")
    assert tab.inner_text("#where") == "all blocks"
    before = picture(tab)
    tab.keyboard.press("m")
    assert picture(tab) != before


def test_class_search(tab: Any) -> None:
    before = picture(tab)
    tab.locator("#class").fill("nin")
    tab.locator("#class").press("Enter")
    assert tab.inner_text("#caption").startswith("nine:")
    assert picture(tab) != before
    tab.locator("#class").fill("llama")
    tab.locator("#class").press("Enter")
    assert "No class is called" in tab.inner_text("#note")


def test_methods_differ_and_say_which_they_are(tab: Any) -> None:
    pictures = set()
    for title in (
        "patch-importance",
        "class-embedding-projection",
        "class-embedding-gradient",
        "memory-patch-importance",
    ):
        choose(tab, title)
        chosen = tab.locator("#methods [aria-checked=true]").inner_text()
        assert chosen == title
        pictures.add(picture(tab))
    assert len(pictures) == 4
    choose(tab, "class-embedding-projection")
    drag(tab, 1)
    assert tab.is_disabled("#head")


def test_cells_lead_to_their_head(tab: Any) -> None:
    tab.locator("#cells rect").nth(4 * 2 + 1).click()
    assert tab.inner_text("#where") == "block 2"
    assert tab.input_value("#head") == "2"


def test_ledger_adds_up_to_the_logit(tab: Any, inputs: torch.Tensor) -> None:
    logit = demo_vit()(inputs)[0, DEMO_CLASSES.index("seven")].item()
    for view in ("Parts", "Blocks", "Heads", "Patches"):
        choose(tab, view)
        caption = tab.inner_text("#ledgerCaption")
        assert number(caption.rstrip(".").split()[-1]) == pytest.approx(logit, abs=2e-4)
        labels = tab.locator("#waterfall [aria-label=text] text").all_text_contents()
        terms = [number(label) for label in labels]
        assert sum(terms[:-1]) == pytest.approx(terms[-1], abs=0.005 * len(terms))
        assert terms[-1] == pytest.approx(logit, abs=0.0051)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(scheme: str, browser: Any, file: Path) -> None:
    """Nothing sticks out, buttons fit a finger, and a tap reads a patch."""
    options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    tab = opened(browser, file, color_scheme=scheme, **options)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    heights = tab.evaluate("[...document.querySelectorAll('button')].map(b => b.clientHeight)")
    assert min(heights) >= 30
    point_at(tab, 2, 6, "tap")
    assert tab.inner_text("#token") == "Patch in row 3, column 7"
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == (scheme == "dark")
    assert tab.said == []
    tab.context.close()


def test_notebook_frame(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "notebook.html").write_text(explore(demo_vit(), IMAGE)._repr_html_())
    tab = browser.new_page()
    tab.goto((tmp_path / "notebook.html").as_uri())
    frame = tab.frame_locator("iframe")
    frame.locator("html[data-ready]").wait_for(state="attached", timeout=20_000)
    assert frame.locator("#title").inner_text() == IMAGE.name
    tab.context.close()


def test_what_is_missing_is_said(browser: Any, tmp_path: Path) -> None:
    """A class outside the focus has summed maps alone."""
    path = tmp_path / "page.html"
    given = noise(classes=40)
    given.names[30] = "llama"
    explorer_page(given).save(path)
    tab = opened(browser, path)
    tab.locator("#class").fill("llama")
    tab.locator("#class").press("Enter")
    drag(tab, 1)
    assert "llama" in tab.inner_text("#note")
    assert "none of them" in tab.inner_text("#ledgerCaption")
    assert tab.said == []
    tab.context.close()
