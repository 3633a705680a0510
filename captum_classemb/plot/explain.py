"""One page that explains one image: what the model saw, what it thought, and where it looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captum_classemb.errors import InputError
from captum_classemb.plot.maps import Scale, bare, color_scale, overlay_map

Floats = npt.NDArray[np.floating]

MAX_TARGETS = 4

# Inches. Every panel is placed by hand, so that columns and rows line up whatever the texts are.
_PANEL = 2.75
_GAP = 0.42
_MARGIN = 0.28
_TITLE = 0.50
_FOOT = 0.50
_HEADING = 0.30

# Okabe and Ito's colours, which stay apart for every common colour blindness.
_TARGET_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_OTHER_COLOR = "#B8B8B8"
_INK = "#222222"
_FAINT = "#767676"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
}


@dataclass(frozen=True)
class ClassScore:
    """A class with the probability that the model gives it."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class PatchMaps:
    """The maps of one method.

    Args:
        title: the method.
        caption: what the scores are, in a few words.
        values: K×h×w, one map for each target.
    """

    title: str
    caption: str
    values: Floats


def explanation_figure(
    image: npt.NDArray[np.uint8],
    maps: Sequence[PatchMaps],
    targets: Sequence[ClassScore],
    top: Sequence[ClassScore],
    patches: Floats,
    cls: Floats | None = None,
    *,
    title: str = "",
    subtitle: str = "",
    smooth: bool = True,
) -> Figure:
    """Draw the image, its top classes, class identifiability over the blocks, and the maps.

    Args:
        image: H×W×3, 8 bits: what the model saw.
        maps: one entry for each method, in the order of the columns.
        targets: the K classes explained, at most four, in the order of the rows.
        top: the classes of highest probability, highest first; targets are added to them.
        patches: K×L×N, class identifiability of the patch tokens after each block.
        cls: K×L, that of the CLS token, where the model has one.
        title: of the image.
        subtitle: of the model.
        smooth: see `captum_classemb.plot.maps.upsample`.

    Returns:
        A figure, which belongs to no window.

    Raises:
        InputError: if there are no or more than four targets, or no maps.
        NonFiniteError: if a map holds NaN or infinity.
    """
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise InputError(f"{len(targets)} targets were given: one figure shows 1 to {MAX_TARGETS}.")
    if not maps:
        raise InputError("No maps were given: one figure shows those of at least one method.")
    # A single method leaves room for the targets side by side.
    abreast = len(maps) == 1
    columns, rows = (len(targets), 1) if abreast else (len(maps), len(targets))
    page = _Page(max(3, columns), rows, image.shape[0] / image.shape[1])
    colors = dict(zip((target.index for target in targets), _TARGET_COLORS, strict=False))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=page.size)
        _draw_image(page.summary(figure, 0), image, title, subtitle)
        _draw_classes(page.summary(figure, 1), top, targets, colors)
        _draw_evolution(page.summary(figure, 2, page.columns - 2), patches, cls)
        for k, target in enumerate(targets):
            row, column = (0, k) if abreast else (k, 0)
            name, note = _shortened(target.name, 60), f"class {target.index}"
            if abreast:
                name = _shortened(name, 18)
            else:
                note += f"  ·  {_percent(target.probability)}"
            _draw_heading(page.heading(figure, row, column), name, note, colors[target.index])
            for method in maps:
                ax = page.map(figure, row, column)
                scale = color_scale(method.values)
                overlay_map(ax, image, method.values[k], smooth=smooth, scale=scale)
                ax.set_title(method.title, fontsize=8.5, pad=4)
                _draw_scale(page.scale(figure, row, column), scale, method)
                column += 1
    return figure


@dataclass(frozen=True)
class _Page:
    """Where the panels are: a row of three that sum up, and a row of maps for each target.

    Args:
        columns: of maps.
        rows: of maps.
        aspect: height of the image over its width.
    """

    columns: int
    rows: int
    aspect: float

    @property
    def _height(self) -> float:
        return _PANEL * min(self.aspect, 1.0)

    @property
    def _summary_height(self) -> float:
        # The image may be flat, the list beside it is not.
        return max(self._height, 0.85 * _PANEL)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the page."""
        width = 2 * _MARGIN + self.columns * _PANEL + (self.columns - 1) * _GAP
        return width, self._top(self.rows)

    def _top(self, row: int) -> float:
        """From the top of the page to that of a row of maps; that of the row after: its height."""
        return (
            _TITLE + self._summary_height + _FOOT + row * (_HEADING + 0.22 + self._height + _FOOT)
        )

    def _axes(self, figure: Figure, box: tuple[float, float, float, float]) -> Axes:
        """Axes at left, top, width, height, all from the upper left corner."""
        left, top, width, height = box
        page_width, page_height = self.size
        return figure.add_axes(
            (
                left / page_width,
                1 - (top + height) / page_height,
                width / page_width,
                height / page_height,
            )
        )

    def _left(self, column: int) -> float:
        return _MARGIN + column * (_PANEL + _GAP)

    def summary(self, figure: Figure, column: int, span: int = 1) -> Axes:
        width = span * _PANEL + (span - 1) * _GAP
        return self._axes(figure, (self._left(column), _TITLE, width, self._summary_height))

    def _map_box(self, row: int, column: int) -> tuple[float, float, float, float]:
        width = self._height / self.aspect
        return self._left(column), self._top(row) + _HEADING + 0.22, width, self._height

    def map(self, figure: Figure, row: int, column: int) -> Axes:
        return self._axes(figure, self._map_box(row, column))

    def scale(self, figure: Figure, row: int, column: int) -> Axes:
        left, top, width, height = self._map_box(row, column)
        return self._axes(figure, (left, top + height + 0.06, width, 0.06))

    def heading(self, figure: Figure, row: int, column: int) -> Axes:
        return self._axes(figure, (self._left(column), self._top(row), _PANEL, _HEADING - 0.1))


def _draw_image(ax: Axes, image: npt.NDArray[np.uint8], title: str, subtitle: str) -> None:
    ax.imshow(image, interpolation="bicubic")
    ax.set_anchor("NW")
    ax.set_title(_shortened(title, 34), pad=18, parse_math=False)
    ax.annotate(
        _shortened(subtitle, 48),
        parse_math=False,
        xy=(0.0, 1.0),
        xytext=(0.0, 6.0),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=7.5,
        color=_FAINT,
    )
    bare(ax)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _draw_classes(
    ax: Axes, top: Sequence[ClassScore], targets: Sequence[ClassScore], colors: dict[int, str]
) -> None:
    """A list of bars, each under its class's name; targets have their colour."""
    listed = list(top)
    listed += [target for target in targets if target.index not in {score.index for score in top}]
    ax.set_title("Top classes", pad=18)
    for row, score in enumerate(listed):
        chosen = score.index in colors
        color = colors.get(score.index, _OTHER_COLOR)
        ax.barh(row, 1.0, height=0.2, color="#F0F0F0", linewidth=0)
        ax.barh(row, score.probability, height=0.2, color=color, linewidth=0)
        weight = "bold" if chosen else "normal"
        ax.text(
            0.0,
            row - 0.17,
            _shortened(score.name, 27),
            va="bottom",
            weight=weight,
            parse_math=False,
        )
        ax.text(
            1.0, row - 0.17, _percent(score.probability), va="bottom", ha="right", weight=weight
        )
    # Names stand above their bars; a short list does not spread over the panel.
    ax.set(xlim=(0.0, 1.0), ylim=(max(len(listed), 5) - 0.9, -0.6))
    bare(ax)


def _percent(probability: float) -> str:
    if probability >= 0.9995:
        return "100 %"
    return f"{100 * probability:.1f} %" if probability >= 0.001 else "< 0.1 %"


def _draw_evolution(ax: Axes, patches: Floats, cls: Floats | None) -> None:
    blocks = np.arange(patches.shape[1])
    shade = 0.16 if len(patches) == 1 else 0.08
    mean: dict[str, Any] = {"linestyle": (0, (3, 1.5)), "linewidth": 1.4}
    token: dict[str, Any] = {"linewidth": 1.9, "marker": "o", "markersize": 3.2}
    for row, color in zip(range(len(patches)), _TARGET_COLORS, strict=False):
        low, high = np.quantile(patches[row], (0.1, 0.9), axis=-1)
        ax.fill_between(blocks, low, high, color=color, alpha=shade, linewidth=0)
        ax.plot(blocks, patches[row].mean(-1), color=color, **mean)
        if cls is not None:
            ax.plot(blocks, cls[row], color=color, **token)
    ax.set_title("Class identifiability after each block", pad=18)
    ax.set(ylim=(0.0, 1.02), xlim=(-0.3, len(blocks) - 0.7))
    ax.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], labels=["0", "0.25", "0.5", "0.75", "1"])
    ax.set_xticks(blocks[:: -(-len(blocks) // 8)])
    ax.set_xlabel("block", fontsize=7.5, color=_FAINT, labelpad=1)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)
    key = _FAINT if len(patches) > 1 else _TARGET_COLORS[0]
    if cls is not None:
        ax.plot([], [], color=key, label="CLS", **token)
    ax.plot([], [], color=key, label="patches: mean", **mean)
    ax.fill_between([], [], [], color=key, alpha=0.2, linewidth=0, label="10–90 %")
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=7.5,
        handlelength=1.8,
        columnspacing=1.2,
        borderpad=0.2,
        borderaxespad=0.0,
    )


def _draw_scale(ax: Axes, scale: Scale, method: PatchMaps) -> None:
    """The colours of a method, which all targets share; ≤ and ≥ where scores lie beyond."""
    colors, norm = scale
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 0.0)
    ramp = np.linspace(low, high, 257)[None]
    ax.imshow(ramp, cmap=colors, norm=norm, aspect="auto", extent=(low, high, 0, 1))
    ticks = (low, 0.0, high) if low < 0 else (0.0, high)
    labels = [_signed(tick) for tick in ticks]
    if method.values.max() > high:
        labels[-1] = f"≥ {labels[-1]}"
    if method.values.min() < low:
        labels[0] = f"≤ {labels[0]}"
    ax.set_xticks(ticks, labels=labels)
    ax.set_yticks([])
    ax.tick_params(length=0, pad=2)
    ax.spines[:].set_visible(False)
    # The outer labels end where the bar does.
    ax.get_xticklabels()[0].set_horizontalalignment("left")
    ax.get_xticklabels()[-1].set_horizontalalignment("right")
    ax.set_xlabel(method.caption, fontsize=7.5, color=_FAINT, labelpad=1)


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−") if value else "0"


def _draw_heading(ax: Axes, name: str, note: str, color: str) -> None:
    """A target's name over its maps."""
    ax.axis("off")
    heading = ax.text(
        0.0,
        0.5,
        f"■ {name}",
        parse_math=False,
        va="center_baseline",
        fontsize=10.5,
        fontweight="bold",
        color=color,
    )
    ax.annotate(
        note,
        xy=(1.0, 0.5),
        xytext=(8.0, 0.0),
        xycoords=heading,
        textcoords="offset points",
        va="center_baseline",
        fontsize=8.5,
        color=_FAINT,
    )
