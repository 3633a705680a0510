"""The figure of removal curves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from captum_classemb.evaluation.removal_order import MEASURES
from captum_classemb.runs.tables import Row, select


def draw(rows: Sequence[Row], methods: Sequence[str], model: str) -> Figure:
    """Accuracy and target probability against the share removed."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = matplotlib.colormaps["viridis"](torch.linspace(0.0, 0.92, len(methods)).numpy())
    for axis, measure in zip(axes, MEASURES[:2], strict=True):
        for method, colour in zip(methods, colours, strict=True):
            for side, style in (("negative", "-"), ("positive", "--")):
                head = f"{method}/{measure}/{side}@"
                points = [
                    (float(row.metric[len(head) :]), row.value)
                    for row in select(rows, model=model)
                    if row.metric.startswith(head)
                ]
                label = method if side == "negative" else None
                x, y = zip(*points, strict=True)
                axis.plot(x, y, style, color=colour, label=label, linewidth=1.7)
        axis.set_title("accuracy" if measure == "accuracy" else "probability of the label")
        axis.set_xlabel("share of patches removed")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(methods)),
        frameon=False,
        fontsize=9,
        title="solid: least important first; dashed: most important first",
        title_fontsize=9,
    )
    return figure
