"""The long table that every study writes: one measured number a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from captum_classemb.atomic_file import write_atomically


class Row(NamedTuple):
    """One number.

    Attributes:
        study: name of the study.
        model: what the model is called.
        block: counted from 0; −1 where no single block is meant.
        site: ``resid_pre``, ``attn_out``, ``resid_mid``, ``mlp_out`` or ``resid_post``; empty
            where none is meant.
        tokens: ``cls`` or ``image``; empty for numbers that belong to no token.
        group: ``all``, ``class``, ``context`` or ``class - context``.
        variant: ``corrected`` or ``paper``.
        metric: name of the metric.
        value: the number; NaN where nothing was counted.
        n: how many tokens, images or classes it is the mean of.
    """

    study: str
    model: str
    block: int
    site: str
    tokens: str
    group: str
    variant: str
    metric: str
    value: float
    n: int


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a table as CSV; numbers are written so that reading gives the same bits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        writer.writerow([*row[:8], repr(float(row.value)), int(row.n)])
    write_atomically(path, text.getvalue().encode())


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote."""
    with path.open(encoding="utf-8", newline="") as lines:
        next(lines)
        rows = []
        for study, model, block, site, tokens, group, variant, metric, value, n in csv.reader(
            lines
        ):
            number = float(value)
            labels = (site, tokens, group, variant, metric)
            rows.append(Row(study, model, int(block), *labels, number, int(n)))
        return rows


def select(rows: Sequence[Row], **fields: Any) -> list[Row]:
    """The rows that have these values, in order.

    Examples:
        >>> row = Row("s", "m", 0, "mlp_out", "cls", "all", "paper", "rate", 0.5, 2)
        >>> select([row], metric="rate", block=1)
        []
    """
    wanted: Mapping[str, Any] = fields
    return [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]
