"""Lines over blocks, drawn from the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from captum_classemb.runs.tables import Row, select

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Of cividis and viridis: told apart in grey and by colour-blind readers.
COLOURS = {"cls": "#440154", "image": "#2a788e", "class": "#22a884", "context": "#b8a22f"}
#: Of several models (Okabe and Ito), and the styles of those that follow.
_MODELS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
SITE_NAMES = {"resid_post": "after block", "attn_out": "attention", "mlp_out": "MLP"}


class Series(NamedTuple):
    """One line: what it is called, which rows it shows, and how it is drawn."""

    label: str
    rows: dict[str, str]
    colour: str
    style: str = "-"


TOKEN_SERIES = (
    Series("CLS", {"tokens": "cls", "group": "all"}, COLOURS["cls"]),
    Series("image tokens", {"tokens": "image", "group": "all"}, COLOURS["image"]),
    Series("… of the class", {"tokens": "image", "group": "class"}, COLOURS["class"], "--"),
    Series("… of the context", {"tokens": "image", "group": "context"}, COLOURS["context"], ":"),
)


class Panel(NamedTuple):
    """One panel: the rows it shows, its lines, what is above it and beside it, its range."""

    rows: Sequence[Row]
    series: Sequence[Series]
    title: str
    label: str
    limits: tuple[float, float] = (0.0, 1.0)


def up_to_highest(panels: Sequence[Panel]) -> list[Panel]:
    """The panels on one range, from 0 to a little above the highest line."""
    values = [
        row.value
        for panel in panels
        for series in panel.series
        for row in select(panel.rows, **series.rows)
    ]
    top = min(1.0, 1.05 * max(values, default=1.0))
    return [panel._replace(limits=(0.0, top)) for panel in panels]


def model_colour(number: int) -> str:
    """The colour of one of several models, counted from 0."""
    return _MODELS[number % len(_MODELS)]


def model_names(rows: Sequence[Row]) -> str:
    """The models of a table, for a title."""
    names = list(dict.fromkeys(row.model for row in rows))
    return " and ".join(names) if len(names) < 3 else f"{len(names)} models"


def by_block(title: str, panels: Sequence[Panel]) -> Figure:
    """A figure of panels over blocks, with one legend; of several models a panel for each line."""
    panels = _by_model(panels)
    figure, axes = new_figure(len(panels), title)
    for axis, panel in zip(axes, panels, strict=True):
        lines(axis, *panel)
    shared_legend(figure, axes)
    return figure


def _by_model(panels: Sequence[Panel]) -> Sequence[Panel]:
    """The lines of several models side by side: a panel for each series, a line for each model."""
    models = list(dict.fromkeys(row.model for panel in panels for row in panel.rows))
    if len(models) < 2:
        return panels
    made = []
    for panel in panels:
        for series in panel.series:
            chosen = [
                Series(
                    model,
                    {**series.rows, "model": model},
                    model_colour(i),
                    ("-", "--", ":")[i // len(_MODELS) % 3],
                )
                for i, model in enumerate(models)
                if select(panel.rows, **series.rows, model=model)
            ]
            if chosen:
                title = f"{panel.title}\n{series.label}"
                made.append(panel._replace(series=chosen, title=title))
    return made


def new_figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with at most three panels side by side, without touching pyplot's state."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = -(-panels // 3)
    columns = -(-panels // rows)
    figure = Figure(
        figsize=(3.4 * columns + 0.6, 3.0 * rows + 0.7),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08),
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[panels:]:
        spare.remove()
    axes = axes[:panels]
    figure.suptitle(title, fontsize=11)
    return figure, axes


def lines(
    axis: Axes,
    rows: Sequence[Row],
    series: Sequence[Series],
    title: str,
    label: str,
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> None:
    """Draw each series' value by block, as far as it has rows."""
    drawn: set[float] = set()
    depths = {model: max(r.block for r in rows if r.model == model) + 1
              for model in {row.model for row in rows}}  # fmt: skip
    # Models of different depth are drawn over the share of their blocks.
    shares = len(set(depths.values())) > 1
    for one in series:
        chosen = sorted(select(rows, **one.rows), key=lambda row: row.block)
        if not chosen:
            continue
        blocks = [(row.block + 1) / depths[row.model] if shares else row.block for row in chosen]
        drawn.update(blocks)
        axis.plot(
            blocks, [row.value for row in chosen], one.style, color=one.colour, label=one.label,
            marker="o", markersize=3, linewidth=1.6,
        )  # fmt: skip
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("share of the blocks" if shares else "block")
    axis.set_ylabel(label)
    if drawn and not shares:
        # The last block is the one that is talked about.
        axis.set_xticks(sorted(drawn, reverse=True)[:: max(1, len(drawn) // 6)])
    if limits is not None:
        margin = 0.03 * (limits[1] - limits[0])
        axis.set_ylim(limits[0] - margin, limits[1] + margin)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def shared_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Artist] = {}
    for axis in axes:
        drawn, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, drawn, strict=True))
    # About four entries fit below two panels.
    places = len({round(axis.get_position().x0, 3) for axis in axes})
    rows = -(-len(entries) // (2 * places))
    columns = -(-len(entries) // rows)
    handles = list(entries.values())
    figure.legend(
        handles, list(entries), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
