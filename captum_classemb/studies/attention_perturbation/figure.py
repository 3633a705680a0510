"""The figure of cut attention."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.panels import (
    COLOURS,
    Panel,
    Series,
    by_block,
    model_names,
    up_to_highest,
)
from captum_classemb.studies.perturbation import UNPERTURBED

_NAMES = {
    UNPERTURBED: ("unperturbed", COLOURS["cls"], "-"),
    "no_cls": ("image tokens do not see CLS", COLOURS["class"], "--"),
    "self_only": ("image tokens do not see each other", COLOURS["context"], "-"),
}


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """Identifiability of image tokens and of CLS under each condition."""
    model = model_names(rows)
    image, cls = (select(rows, tokens=tokens, group="all") for tokens in ("image", "cls"))
    mean, rate = _series("class_identifiability"), _series("class_identifiability_rate")
    drawn = [
        Panel(image, mean, "image tokens: identifiability", "mean of 1 − rank/C"),
        *up_to_highest([Panel(image, rate, "image tokens: rate", "share of tokens with rank 0")]),
    ]
    if cls:
        drawn.append(Panel(cls, rate, "CLS: rate", "share of images with rank 0"))
    title = f"Class identifiability where attention is cut, {model}"
    return {"attention_perturbation": by_block(title, drawn)}


def _series(metric: str) -> list[Series]:
    return [
        Series(words, {"metric": f"{name}/{metric}"}, colour, style)
        for name, (words, colour, style) in _NAMES.items()
    ]
