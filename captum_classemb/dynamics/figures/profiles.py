"""Figures of feature maps by depth and frequency (content of Park & Kim's Figures 2, 3, 8, 9).

Every function draws plain arrays on one axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

Floats = npt.NDArray[np.floating]

KIND_COLOURS: Mapping[str, str] = {
    "attention": "#b9b6c9",
    "mlp": "#ffffff",
    "convolution": "#ffffff",
    "pooling": "#a9d3e0",
    "block": "#ece3bd",
}
_NAMES = {"mlp": "MLP"}
#: Colours of models: told apart in grey and by colour-blind readers.
COLOURS = ("#31688e", "#b5367a", "#1f9e6e", "#c98a00", "#5c4b8a")
_MARKERS = ("D", "o", "s", "^", "v")


def _depth_map() -> ListedColormap:
    """Plasma without its palest end, which vanishes on white."""
    import matplotlib

    return ListedColormap(matplotlib.colormaps["plasma"](np.linspace(0.0, 0.88, 256)))


def _pi_axis(axis: Axes) -> None:
    axis.set_xlim(0, np.pi * 1.02)
    axis.set_xticks([0, np.pi / 4, np.pi / 2, 3 * np.pi / 4, np.pi])
    axis.set_xticklabels(["0", "π/4", "π/2", "3π/4", "π"])
    axis.set_xlabel("frequency (radians per cell)")


def model_line(
    axis: Axes,
    index: int,
    name: str,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    markersize: float = 4.5,
    linewidth: float = 1.6,
) -> None:
    """Draw the line of one of several models, in the colour and with the marker of its index."""
    axis.plot(
        x, y, color=COLOURS[index % len(COLOURS)], marker=_MARKERS[index % len(_MARKERS)],
        markersize=markersize, linewidth=linewidth, label=name, markeredgecolor="white",
        markeredgewidth=0.5,
    )  # fmt: skip


def tidy(axis: Axes) -> None:
    """Leave two spines and a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#000000", alpha=0.08, linewidth=0.8)
    axis.set_axisbelow(True)


def fourier_lines(
    axis: Axes, frequencies: Sequence[Floats], amplitudes: Sequence[Floats], title: str = ""
) -> None:
    """Δ log amplitude by frequency, one line for each step, coloured by depth (Figure 2a).

    Args:
        axis: where to draw.
        frequencies: for each step, radians per cell.
        amplitudes: for each step, Δ log amplitude at these frequencies.
        title: of the axis.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = _depth_map()
    last = max(len(amplitudes) - 1, 1)
    for i, (x, y) in enumerate(zip(frequencies, amplitudes, strict=True)):
        axis.plot(x, y, color=colours(i / last), linewidth=1.5)
    _pi_axis(axis)
    tidy(axis)
    axis.set_ylabel("Δ log amplitude")
    axis.set_title(title, fontsize=10)
    bar = axis.figure.colorbar(
        ScalarMappable(Normalize(0, 1), colours), ax=axis, pad=0.02, aspect=30, ticks=[0, 0.5, 1]
    )
    bar.set_label("normalised depth")
    bar.outline.set_visible(False)


def depth_profile(
    axis: Axes,
    kinds: Sequence[str],
    values: Mapping[str, Sequence[float]],
    label: str,
    title: str = "",
    log: bool = False,
) -> None:
    """A value after each step, the kinds of steps shaded (Figures 8 and 9).

    Args:
        axis: where to draw.
        kinds: the kind of each step, the embedding first.
        values: one value for each step, by the name of the line.
        label: of the values.
        title: of the axis.
        log: draw the values on a logarithmic axis.
    """
    last = max(len(kinds) - 1, 1)
    for i in range(1, len(kinds)):
        shade = KIND_COLOURS.get(kinds[i], "#ffffff")
        axis.axvspan((i - 1) / last, i / last, color=shade, alpha=0.55, linewidth=0)
    for i, (name, line) in enumerate(values.items()):
        model_line(axis, i, name, np.arange(len(line)) / last, line)
    axis.set_xlim(-0.01, 1.01)
    axis.set_xlabel("normalised depth")
    axis.set_ylabel(label)
    axis.set_title(title, fontsize=10)
    if log:
        axis.set_yscale("log")
    tidy(axis)
    shades = [
        Patch(facecolor=KIND_COLOURS[kind], edgecolor="#888888", linewidth=0.6,
              label=_NAMES.get(kind, kind))
        for kind in dict.fromkeys(kinds)
        if kind in KIND_COLOURS
    ]  # fmt: skip
    lines = axis.get_legend_handles_labels()[0] if len(values) > 1 else []
    axis.legend(
        handles=[*lines, *shades], fontsize=8, frameon=False, ncols=len(lines) + len(shades),
        loc="lower center", bbox_to_anchor=(0.5, 1.0 if not title else 1.08), handlelength=1.4,
        columnspacing=1.2,
    )  # fmt: skip


def frequency_noise_lines(
    axis: Axes, frequencies: Floats, accuracies: Mapping[str, Floats], title: str = ""
) -> None:
    """Decline of accuracy under noise of each band (Figure 2b).

    Args:
        axis: where to draw.
        frequencies: middle of each band, radians per pixel.
        accuracies: by model: accuracy without noise, then with noise of each band.
        title: of the axis.
    """
    for i, (name, values) in enumerate(accuracies.items()):
        decline = 100 * (np.asarray(values)[1:] - np.asarray(values)[0])
        model_line(axis, i, name, frequencies, decline, markersize=5, linewidth=1.8)
    _pi_axis(axis)
    tidy(axis)
    axis.set_xlabel("frequency of the noise (radians per pixel)")
    axis.set_ylabel("change of accuracy (points)")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=9, frameon=False)


def similarity_matrix(
    axis: Axes, similarity: Floats, names: tuple[str, str], title: str = ""
) -> None:
    """CKA between the layers of two models.

    Args:
        axis: where to draw.
        similarity: L×M.
        names: of the models whose layers lie along the vertical and the horizontal axis.
        title: of the axis.
    """
    image = axis.imshow(similarity, origin="lower", cmap="magma", vmin=0, vmax=1, aspect="auto")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_ylabel(f"{names[0]}: step")
    axis.set_xlabel(f"{names[1]}: step")
    axis.set_title(title, fontsize=10)
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02, aspect=30, ticks=[0, 0.5, 1])
    bar.set_label("CKA")
    bar.outline.set_visible(False)


#: Colours of kinds of steps where they are bars or boxes.
_SOLID = {
    "attention": "#7a6fb0", "mlp": "#e0a13a", "convolution": "#3b8e78", "block": "#8a8a8a",
    "pooling": "#5aa5bd",
}  # fmt: skip


def lesion_bars(
    axis: Axes,
    kinds: Sequence[str],
    blocks: Sequence[int],
    accuracies: Sequence[float],
    whole: float,
    title: str = "",
) -> None:
    """Accuracy without each part, by block (Figures 10 and 11).

    Args:
        axis: where to draw.
        kinds: what was removed.
        blocks: from which block.
        accuracies: of the model without it.
        whole: accuracy of the whole model.
        title: of the axis.
    """
    sorts = list(dict.fromkeys(kinds))
    width = 0.8 / len(sorts)
    for i, sort in enumerate(sorts):
        chosen = [j for j, kind in enumerate(kinds) if kind == sort]
        x = np.array([blocks[j] for j in chosen]) + (i - (len(sorts) - 1) / 2) * width
        axis.bar(
            x, [100 * accuracies[j] for j in chosen], width * 0.92, label=_NAMES.get(sort, sort),
            color=_SOLID.get(sort, "#8a8a8a"),
        )  # fmt: skip
    axis.axhline(100 * whole, color="#222222", linewidth=1, linestyle=(0, (4, 3)))
    axis.set_xticks(sorted(set(blocks)))
    axis.set_ylim(0, 104)
    axis.set_xlabel("block")
    axis.set_ylabel("accuracy without it (%)")
    axis.set_title(title, fontsize=10)
    tidy(axis)
    axis.legend(
        fontsize=8, frameon=False, ncols=len(sorts), loc="lower center",
        bbox_to_anchor=(0.5, 1.0 if not title else 1.08),
    )  # fmt: skip


def step_pattern(axis: Axes, kinds: Mapping[str, Sequence[str]]) -> None:
    """What a model does step by step: one row of boxes for each model (Figure 3).

    Args:
        axis: where to draw.
        kinds: the kind of each step, by model; the embedding is left out.
    """
    shown: list[str] = []
    for row, steps in enumerate(kinds.values()):
        inside = [kind for kind in steps if kind != "embedding"]
        shown += inside
        for place, kind in enumerate(inside):
            axis.barh(-row, 0.82, left=place + 0.09, height=0.56, color=_SOLID.get(kind, "#8a8a8a"))
    deepest = max(len(steps) for steps in kinds.values())
    axis.set_xlim(0, deepest - 1)
    axis.set_ylim(0.5 - len(kinds), 0.6)
    axis.set_yticks([-row for row in range(len(kinds))], labels=list(kinds))
    axis.set_xticks([])
    axis.set_xlabel("from the first step to the last")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    boxes = [
        Patch(facecolor=_SOLID.get(kind, "#8a8a8a"), label=_NAMES.get(kind, kind))
        for kind in dict.fromkeys(shown)
    ]
    axis.legend(
        handles=boxes, fontsize=8, frameon=False, ncols=len(boxes), loc="lower center",
        bbox_to_anchor=(0.5, 1.0), handlelength=1.2,
    )  # fmt: skip
