"""Figures of the memories study, from its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.panels import (
    COLOURS,
    TOKEN_SERIES,
    Panel,
    Series,
    by_block,
    model_names,
    up_to_highest,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = {"attn_out": "attention", "mlp_out": "MLP"}
_RANDOM = "#8a8a8a"


def _class_value(rows: Sequence[Row], model: str) -> Figure:
    series = (
        Series("trained model", {"metric": "class_value_agreement"}, COLOURS["image"]),
        Series("random model", {"metric": "class_value_agreement_random_model"}, _RANDOM, ":"),
    )
    return _by_layer(rows, series, f"Class–value agreement, {model}", "mean highest cosine")


def _tokens(rows: Sequence[Row], metric: str, title: str, label: str, control: str) -> Figure:
    series = [
        Series(s.label, {**s.rows, "metric": metric}, s.colour, s.style) for s in TOKEN_SERIES
    ]
    if control:
        random = {"tokens": "image", "group": "all", "metric": control}
        series.append(Series("image tokens, random class", random, _RANDOM, ":"))
    return _by_layer(rows, series, title, label)


def _by_outcome() -> list[Series]:
    """CLS and image tokens of correctly classified and of misclassified images."""
    made = []
    for tokens, words in (("cls", "CLS"), ("image", "image tokens")):
        for name, style in (("correct", "-"), ("misclassified", "--")):
            rows = {"tokens": tokens, "group": "all", "metric": f"key_value_agreement_rate_{name}"}
            made.append(Series(f"{words}, {name}", rows, COLOURS[tokens], style))
    return made


def _by_layer(rows: Sequence[Row], series: Sequence[Series], title: str, label: str) -> Figure:
    """Attention beside MLP."""
    drawn = [Panel(select(rows, site=site), series, name, label) for site, name in _LAYERS.items()]
    return by_block(title, up_to_highest(drawn))


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """Class–value agreement, key–value agreement rate, compositionality."""
    model = model_names(rows)
    return {
        "class_value_agreement": _class_value(rows, model),
        "key_value_agreement": _tokens(
            rows,
            "key_value_agreement_rate",
            f"Tokens whose strong memories stand for their class, {model}",
            "share of tokens",
            "key_value_agreement_rate_random_class",
        ),
        "key_value_agreement_by_outcome": _by_layer(
            rows,
            [
                Series(
                    f"{words}, {name}",
                    {
                        "tokens": tokens,
                        "group": "all",
                        "metric": f"key_value_agreement_rate_{name}",
                    },
                    COLOURS[tokens],
                    style,
                )
                for tokens, words in (("cls", "CLS"), ("image", "image tokens"))
                for name, style in (("correct", "-"), ("misclassified", "--"))
            ],
            f"Strong memories stand for the class where the prediction is right, {model}",
            "share of tokens",
        ),
        "memory_compositionality": _tokens(
            rows,
            "memory_compositionality",
            f"Strong memories that predict what the layer predicts, {model}",
            "share of (token, memory) pairs",
            "",
        ),
    }
