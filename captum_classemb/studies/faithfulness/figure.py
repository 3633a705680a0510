"""Figures of removal curves, and of what methods reach at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from captum_classemb.evaluation.removal_order import MEASURES
from captum_classemb.runs.tables import Row, select
from captum_classemb.studies.panels import model_colour

_GREY = "#777777"


def draw(curves: Sequence[Row], areas: Sequence[Row]) -> dict[str, Figure]:
    """Curves of each model's methods; gaps of all methods, beside their time if it was measured."""
    figures = {"curves": _curves(curves)}
    if any(row.metric.endswith("accuracy/gap") for row in areas):
        figures["methods"] = _methods(areas)
    return figures


def _names(rows: Sequence[Row], end: str = "") -> list[str]:
    """The methods of a table, in order."""
    names = (row.metric.split("/")[0] for row in rows if row.metric.endswith(end))
    return [name for name in dict.fromkeys(names) if name != "random"]


def _points(rows: Sequence[Row], head: str) -> tuple[list[float], list[float]]:
    chosen = [row for row in rows if row.metric.startswith(head)]
    return [float(row.metric[len(head) :]) for row in chosen], [row.value for row in chosen]


def _curves(rows: Sequence[Row]) -> Figure:
    """Accuracy and target probability against the share removed, a line of panels a model."""
    import matplotlib

    models, methods = list(dict.fromkeys(row.model for row in rows)), _names(rows)
    figure = Figure(figsize=(8.6, 3.0 * len(models) + 0.9), layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False)
    colours = matplotlib.colormaps["viridis"](torch.linspace(0.0, 0.92, len(methods)).numpy())
    for line, model in zip(axes, models, strict=True):
        own = select(rows, model=model)
        for axis, measure in zip(line, MEASURES[:2], strict=True):
            for method, colour in zip(methods, colours, strict=True):
                for side, style in (("negative", "-"), ("positive", "--")):
                    x, y = _points(own, f"{method}/{measure}/{side}@")
                    label = method if side == "negative" else None
                    axis.plot(x, y, style, color=colour, label=label, linewidth=1.7)
            x, low = _points(own, f"random/{measure}/low@")
            _, high = _points(own, f"random/{measure}/high@")
            axis.fill_between(x, low, high, color=_GREY, alpha=0.35, linewidth=0)
            mean = _points(own, f"random/{measure}/mean@")
            axis.plot(*mean, ":", color=_GREY, label="five random orders", linewidth=1.4)
            title = "accuracy" if measure == "accuracy" else "probability of the class"
            axis.set_title(title if len(models) == 1 else f"{model}: {title}")
            axis.set(xlabel="share of patches removed", xlim=(0, 1), ylim=(0, 1))
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(methods) + 1),
        frameon=False,
        fontsize=9,
        title="solid: least important first; dashed: most important first",
        title_fontsize=9,
    )
    return figure


def _methods(rows: Sequence[Row]) -> Figure:
    """The gap of every method with its interval, a colour a model; and the time of a map."""
    models = list(dict.fromkeys(row.model for row in rows))
    gap = "accuracy/gap"
    reached: dict[str, float] = {}
    for method in _names(rows, gap):
        found = [row.value for row in rows if row.metric == f"{method}/{gap}"]
        reached[method] = sum(found) / len(found)
    order = sorted(reached, key=lambda method: reached[method])
    timed = any(row.metric.endswith("/cost/time") for row in rows)
    figure = Figure(figsize=(8.6 if timed else 5.6, 0.32 * len(order) + 1.7), layout="constrained")
    axes = figure.subplots(1, 1 + timed, squeeze=False, sharey=True)[0]
    for i, model in enumerate(models):
        colour, own = model_colour(i), {row.metric: row.value for row in select(rows, model=model)}
        shift = 0.5 * (i - (len(models) - 1) / 2) / len(models)
        for y, method in enumerate(order):
            value = own.get(f"{method}/{gap}")
            if value is None:
                continue
            ends = [[value - own[f"{method}/{gap}/low"]], [own[f"{method}/{gap}/high"] - value]]
            style: dict[str, Any] = {"fmt": "o", "color": colour, "markersize": 5, "capsize": 2}
            label = model if y == len(order) - 1 else None
            axes[0].errorbar(value, y + shift, xerr=ends, label=label, elinewidth=1, **style)
            time = own.get(f"{method}/cost/time")
            if timed and time is not None:
                axes[1].plot(time, y + shift, "o", color=colour, markersize=5)
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_xlabel("gap: negative − positive area, accuracy")
    axes[0].axvline(0, color=_GREY, linewidth=0.8, linestyle=":")
    if timed:
        axes[1].set(xscale="log", xlabel="time of one map, in forward passes")
        axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].xaxis.set_major_formatter(ScalarFormatter())
        axes[1].xaxis.set_minor_formatter(NullFormatter())
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if len(models) > 1:
        figure.legend(loc="outside lower center", ncols=min(4, len(models)), frameon=False)
    return figure
