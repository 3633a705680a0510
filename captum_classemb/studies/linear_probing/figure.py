"""Figures of the linear-probing study, from its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.panels import COLOURS, SITE_NAMES, Panel, Series, by_block, model_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_READERS = {"probe_accuracy": "linear probe", "projection_accuracy": "class embedding"}
_SITE_COLOURS = {"resid_post": "#440154", "attn_out": "#2a788e", "mlp_out": "#b8a22f"}


def _by_reader(rows: Sequence[Row], model: str) -> Figure:
    """A panel for probe and projection, a line for each site: what image tokens know."""
    chosen = select(rows, tokens="image", group="all")
    series = [Series(name, {"site": s}, _SITE_COLOURS[s]) for s, name in SITE_NAMES.items()]
    drawn = [
        Panel(select(chosen, metric=metric), series, title, "accuracy")
        for metric, title in _READERS.items()
    ]
    return by_block(f"Classes read from image tokens of {model}", drawn)


def _by_site(rows: Sequence[Row], model: str) -> Figure:
    """A panel for each site: probe beside projection, for CLS and image tokens."""
    series = [
        Series(f"{kind}, {words}", {"tokens": tokens, "metric": metric}, COLOURS[tokens], style)
        for tokens, kind in (("cls", "CLS"), ("image", "image tokens"))
        for (metric, words), style in zip(_READERS.items(), ("-", "--"), strict=True)
    ]
    drawn = [
        Panel(select(rows, group="all", site=site), series, name, "accuracy")
        for site, name in SITE_NAMES.items()
    ]
    return by_block(f"Linear probe and class embedding, {model}", drawn)


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """By reader, as the paper shows it, and by site."""
    model = model_names(rows)
    return {
        "probe_and_projection": _by_reader(rows, model),
        "probe_and_projection_by_site": _by_site(rows, model),
    }
