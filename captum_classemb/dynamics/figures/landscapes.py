"""Figures of the loss: Hessian spectra, landscapes, trajectories, robustness (Figures 1, 3, 4)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator, NullFormatter
from mpl_toolkits.mplot3d import Axes3D

from captum_classemb.dynamics.figures.profiles import COLOURS, model_line, tidy

Floats = npt.NDArray[np.floating]


def eigenvalue_density(
    axis: Axes,
    points: Floats,
    densities: Mapping[str, Floats],
    eigenvalues: Mapping[str, Floats],
    title: str = "",
    first_colour: int = 0,
) -> None:
    """Density of Hessian eigenvalues over batches, zero and each eigenvalue marked (Figure 1c).

    Args:
        axis: where to draw.
        points: where the densities were evaluated.
        densities: by model.
        eigenvalues: by model; they are marked under the curves, for the density is smoothed.
        title: of the axis.
        first_colour: number of the first model's colour, for models side by side.
    """
    top = max(float(np.max(density)) for density in densities.values())
    for i, (name, density) in enumerate(densities.items()):
        colour = COLOURS[(first_colour + i) % len(COLOURS)]
        values = np.asarray(eigenvalues[name]).ravel()
        label = f"{name} ({100 * np.mean(values < 0):.0f} % negative)"
        axis.plot(points, density, color=colour, linewidth=1.8, label=label)
        axis.fill_between(points, density, color=colour, alpha=0.15, linewidth=0)
        height = -0.045 * top * (i + 0.75)
        axis.plot(values, np.full(values.shape, height), "|", color=colour, markersize=6, alpha=0.8)
    axis.axvline(0, color="#222222", linewidth=0.8, linestyle=(0, (4, 3)))
    axis.axhline(0, color="#222222", linewidth=0.8)
    axis.set_xlim(float(points[0]), float(points[-1]))
    # Room for the legend above the curves, for the marks below them.
    axis.set_ylim(-0.045 * top * (len(densities) + 0.5), (1.1 + 0.13 * len(densities)) * top)
    axis.set_yticks([tick for tick in axis.get_yticks() if 0 <= tick <= 1.1 * top])
    axis.set_xlabel("top Hessian eigenvalues")
    axis.set_ylabel("density over batches")
    axis.set_title(title, fontsize=10)
    tidy(axis)
    axis.legend(fontsize=8, frameon=False)


def _levels(loss: Floats) -> Floats:
    low, high = float(np.nanmin(loss)), float(np.nanmax(loss[np.isfinite(loss)]))
    return np.geomspace(low, max(high, low * 1.001), 14) if low > 0 else np.linspace(low, high, 14)


def landscape_contour(axis: Axes, along: Floats, loss: Floats, title: str = "") -> None:
    """Contours of a loss landscape, the model itself marked (Figure 1a from above).

    Args:
        axis: where to draw.
        along: coordinates of one side.
        loss: points×points, the first direction along rows.
        title: of the axis.
    """
    finite = np.where(np.isfinite(loss), loss, np.nanmax(loss[np.isfinite(loss)]))
    levels = _levels(finite)
    norm = LogNorm(levels[0], levels[-1]) if levels[0] > 0 else None
    axis.contourf(along, along, finite, levels, cmap="viridis_r", norm=norm, extend="both")
    lines = axis.contour(along, along, finite, levels[::2], colors="white", linewidths=0.7)
    axis.clabel(lines, fmt="%.2g", fontsize=7)
    axis.plot(0, 0, marker="+", color="#d1245a", markersize=9, markeredgewidth=1.8)
    axis.set_aspect("equal")
    ends = [float(along[0]), 0.0, float(along[-1])]
    axis.set_xticks(ends)
    axis.set_yticks(ends)
    axis.set_xlabel("second direction")
    axis.set_ylabel("first direction")
    axis.set_title(title, fontsize=10)


def landscape_surface(
    axis: Axes3D, along: Floats, loss: Floats, ceiling: float | None = None, title: str = ""
) -> None:
    """A loss landscape as a surface (Figure 1a).

    Args:
        axis: a three-dimensional axis.
        along: coordinates of one side.
        loss: points×points, the first direction along rows.
        ceiling: loss above it is cut off, so that two models share one scale.
        title: of the axis.
    """
    top = float(np.nanmax(loss[np.isfinite(loss)])) if ceiling is None else ceiling
    shown = np.minimum(np.where(np.isfinite(loss), loss, top), top)
    x, y = np.meshgrid(along, along)
    axis.plot_surface(
        x, y, shown, cmap="viridis_r", linewidth=0.25, edgecolor="#ffffff60", vmin=0, vmax=top,
        rcount=len(along), ccount=len(along),
    )  # fmt: skip
    axis.set_zlim(0, top)
    axis.view_init(elev=32, azim=-58)
    axis.set_box_aspect((1, 1, 0.75))
    axis.locator_params(nbins=4)
    axis.tick_params(labelsize=7, pad=-2)
    axis.set_title(title, fontsize=10, y=0.98)
    for pane in (axis.xaxis, axis.yaxis, axis.zaxis):
        pane.set_pane_color((1, 1, 1, 0))


def polar_path(axis: Axes, paths: Mapping[str, tuple[Floats, Floats]], title: str = "") -> None:
    """Optimisation trajectories about the final weights (Figure 1b).

    Args:
        axis: a polar axis.
        paths: radius and angle (radians) of each checkpoint, by model.
        title: of the axis.
    """
    for i, (name, (radius, angle)) in enumerate(paths.items()):
        model_line(axis, i, name, angle, radius, linewidth=1.5)
    widest = max(float(np.max(angle)) for _, angle in paths.values())
    farthest = max(float(np.max(radius)) for radius, _ in paths.values())
    half = max(np.pi / 2, np.ceil(widest / (np.pi / 6)) * np.pi / 6)
    axis.set_thetamin(0)  # type: ignore[attr-defined]
    axis.set_thetamax(np.rad2deg(half))  # type: ignore[attr-defined]
    axis.set_rlim(0, 1.08 * farthest)  # type: ignore[attr-defined]
    axis.set_rticks([0.5, 1.0], labels=["", ""])  # type: ignore[attr-defined]
    axis.set_xticks(np.arange(0, half + 0.01, np.pi / 6))
    for mark in (0.5, 1.0):
        # Beside the vertical, inside the axes: the labels of a wedge are cut off below it.
        axis.text(half - 0.06 / mark, mark, f"{mark:g}", fontsize=8, color="#555555", ha="center")
    axis.grid(color="#000000", alpha=0.12)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1.1, 1.08))


def robustness_lines(axis: Axes, values: Mapping[str, Floats], label: str, title: str = "") -> None:
    """A measure of predictions by severity of corruption, severity 0 being clean.

    Args:
        axis: where to draw.
        values: by model: corruptions×severities.
        label: of the measure.
        title: of the axis.
    """
    for i, (name, table) in enumerate(values.items()):
        colour = COLOURS[i % len(COLOURS)]
        x = np.arange(1, table.shape[1] + 1)
        axis.fill_between(x, table.min(0), table.max(0), color=colour, alpha=0.12, linewidth=0)
        model_line(axis, i, name, x, table.mean(0), markersize=5, linewidth=1.8)
    axis.set_xticks(x)
    axis.set_xlabel("severity of the corruption")
    axis.set_ylabel(label)
    axis.set_title(title, fontsize=10)
    tidy(axis)
    axis.legend(fontsize=9, frameon=False)


def by_epoch(
    axis: Axes,
    lines: Mapping[str, tuple[Floats, Floats]],
    label: str,
    title: str = "",
    log: bool = False,
) -> None:
    """A measure of the checkpoints of each model's training.

    Args:
        axis: where to draw.
        lines: epochs and values, by model.
        label: of the measure.
        title: of the axis.
        log: draw the values on a logarithmic axis.
    """
    for i, (name, (epochs, values)) in enumerate(lines.items()):
        model_line(axis, i, name, epochs, values)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel(label)
    axis.set_title(title, fontsize=10)
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(NullFormatter())
    tidy(axis)
    axis.legend(fontsize=8, frameon=False)
