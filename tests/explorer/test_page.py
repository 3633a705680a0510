"""The page as a file: self-contained, small, and its numbers those that went in."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest
from pages import noise, unpacked

from captum_classemb.errors import NonFiniteError, OutputError
from captum_classemb.explorer import explorer_page
from captum_classemb.explorer.quantise import quantise


@pytest.mark.parametrize("signed", [False, True])
def test_scores_survive_to_half_a_step(signed: bool) -> None:
    maps = (
        np.random.default_rng(0).normal(size=(5, 2, 7, 7))
        * 10.0 ** np.arange(-3, 2)[:, None, None, None]
    )
    maps = maps if signed else np.abs(maps)
    maps[..., 0, 0] = 0.0
    stored = quantise(maps)
    error = np.abs(stored.scores - maps)
    assert (error <= 0.5001 * stored.steps[..., None, None]).all()
    assert (stored.scores[..., 0, 0] == 0).all()
    assert stored.zero == (128 if signed else 0)


def test_map_of_zeros_stays_one() -> None:
    assert (quantise(np.zeros((2, 3, 3))).scores == 0).all()


def test_maps_must_be_finite() -> None:
    with pytest.raises(NonFiniteError):
        quantise([[[np.nan]]])


def test_arrays_arrive_as_they_left() -> None:
    given = noise()
    facts, arrays = unpacked(explorer_page(given))
    assert facts["names"] == given.names
    assert facts["grid"] == [4, 4]
    np.testing.assert_array_equal(arrays["ranks"], given.ranks)
    np.testing.assert_array_equal(arrays["topClasses"], given.top_classes)
    np.testing.assert_allclose(
        arrays["topProbabilities"] / 65535, given.top_probabilities, atol=1e-5
    )
    assert given.ledger is not None
    np.testing.assert_allclose(arrays["ledger.heads"], given.ledger.heads, rtol=1e-6)
    for method in given.methods:
        np.testing.assert_array_equal(arrays[f"{method.key}.parts"], method.parts.levels)
        np.testing.assert_array_equal(arrays[f"{method.key}.mapSteps"], method.maps.steps)


def test_page_needs_nothing_from_outside() -> None:
    document = explorer_page(noise()).document
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"'](?!data:)", document)
    assert "{{" not in document.split('id="data"')[0]
    assert "<title>a &lt;b&gt; &amp; c.png</title>" in document
    assert document.count("Permission to use, copy, modify") == 2


def test_libraries_are_under_one_megabyte() -> None:
    document = explorer_page(noise()).document
    assert len(document) - len(re.search(r'id="data">([^<]*)<', document)[1]) < 1_000_000


def test_same_contents_make_the_same_page() -> None:
    assert explorer_page(noise()).document == explorer_page(noise()).document


def test_notebook_shows_the_page_in_a_frame_of_its_own() -> None:
    page = explorer_page(noise())
    match = re.fullmatch(r'<iframe srcdoc="([^"]*)".*</iframe>', page._repr_html_(), re.DOTALL)
    assert match
    assert html.unescape(match[1]) == page.document


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match="choose another"):
        explorer_page(noise()).save(tmp_path / "file" / "page.html")


@pytest.mark.parametrize(
    ("side", "classes", "detailed"), [(14, 1000, 9), (24, 1000, 1), (14, 6000, 1)]
)
def test_pages_up_to_vit_l_stay_under_five_megabytes(
    side: int, classes: int, detailed: int
) -> None:
    """Maps of noise compress as badly as any: 224 and 384 pixels, many classes."""
    page = explorer_page(noise(24, 16, side, classes))
    assert len(page.document) < 5_000_000
    _, arrays = unpacked(page)
    assert len(arrays["memory-patch-importance.parts"]) >= detailed
    assert len(arrays["memory-patch-importance.classes"]) >= min(classes, 300)
