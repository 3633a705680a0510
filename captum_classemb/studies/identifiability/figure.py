"""Figures of the identifiability study, from its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.panels import (
    SITE_NAMES,
    TOKEN_SERIES,
    Panel,
    Series,
    by_block,
    model_names,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SOURCES = (
    ("previous", "block before", "#440154", "-"),
    ("attention", "attention", "#2a788e", "-"),
    ("mlp", "MLP", "#22a884", "--"),
    ("none", "none of them", "#b8a22f", ":"),
)


def _by_block(rows: Sequence[Row], model: str) -> Figure:
    stream = select(rows, site="resid_post")
    panels = (
        ("class_identifiability", "identifiability", "mean of 1 − rank/C"),
        ("class_identifiability_rate", "identifiability rate", "share of tokens"),
        ("images_with_identifiable_token", "images with such a token", "share of images"),
    )
    drawn = [
        Panel(select(stream, metric=metric), TOKEN_SERIES, title, label)
        for metric, title, label in panels
    ]
    return by_block(f"Class identifiability over the blocks of {model}", drawn)


def _by_site(rows: Sequence[Row], metric: str, title: str, label: str) -> Figure:
    drawn = [
        Panel(select(rows, metric=metric, site=site), TOKEN_SERIES, name, label)
        for site, name in SITE_NAMES.items()
    ]
    return by_block(title, drawn)


def _composition(rows: Sequence[Row], model: str) -> Figure:
    series = [
        Series(name, {"metric": f"residual_composition_{source}"}, colour, style)
        for source, name, colour, style in _SOURCES
    ]
    kinds = (
        ("cls", "all", "CLS"),
        ("image", "all", "image tokens"),
        ("image", "class", "class tokens"),
        ("image", "context", "context tokens"),
    )
    drawn = [
        Panel(chosen, series, words, "share of tokens")
        for tokens, group, words in kinds
        if (chosen := select(rows, tokens=tokens, group=group))
    ]
    return by_block(f"Where a block's top class comes from, {model}", drawn)


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """Identifiability by block and by site, change rates, residual composition."""
    model = model_names(rows)
    return {
        "identifiability": _by_block(rows, model),
        "identifiability_by_site": _by_site(
            rows,
            "class_identifiability",
            f"Class identifiability of what each layer of {model} adds",
            "mean of 1 − rank/C",
        ),
        "change_rate": _by_site(
            rows,
            "class_similarity_change_rate",
            f"Share of tokens that come closer to their class, {model}",
            "share of tokens",
        ),
        "residual_composition": _composition(rows, model),
    }
