"""The figure of removed tokens."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from captum_classemb.data import CONTEXT, OBJECT
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

#: What is removed in each pass, and the group of tokens that is left.
REMOVED = {"without_context": (CONTEXT, "class"), "without_class": (OBJECT, "context")}
RATE = "class_identifiability_rate"


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """Class tokens with and without the context, context tokens with and without the class."""
    model = model_names(rows)
    mean = _panels(rows, "class_identifiability", "identifiability", "mean of 1 − rank/C")
    rate = _panels(rows, RATE, "rate", "share of tokens with rank 0")
    title = f"Class identifiability without some tokens, {model}"
    return {"token_perturbation": by_block(title, [*mean, *up_to_highest(rate)])}


def _panels(rows: Sequence[Row], metric: str, words: str, label: str) -> list[Panel]:
    panels = []
    for name, (_, group) in REMOVED.items():
        gone = "context" if group == "class" else "class"
        series = [
            Series("unperturbed", {"metric": f"{UNPERTURBED}/{metric}"}, COLOURS["cls"]),
            Series(f"without {gone} tokens", {"metric": f"{name}/{metric}"}, COLOURS[gone], "--"),
        ]
        chosen = select(rows, tokens="image", group=group)
        panels.append(Panel(chosen, series, f"{group} tokens: {words}", label))
    return panels
