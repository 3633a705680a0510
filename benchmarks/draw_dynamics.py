"""Draw what fourier_variance.py and train_dynamics.py measured.

python benchmarks/draw_dynamics.py --photographs FILE.json --trained FOLDER --output FOLDER
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from captum_classemb.dynamics.figures import landscapes
from captum_classemb.dynamics.figures import profiles as draw
from captum_classemb.dynamics.hessian import density

NAMES = {"ViT": "ViT", "ResNet": "ResNet", "AlterNet": "AlterNet", "demo": "demo ViT"}
HIGH = "Δ log amplitude, highest frequency"
TITLES = {"corrected": "mean over rings, up to π", "paper": "diagonal, as published"}
VARYING = "share of energy varying over space"


def sheet(width: float, height: float) -> Figure:
    """A figure with room between its panels."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")


def arrays(lists: list[list[float]]) -> list[np.ndarray[Any, Any]]:
    return [np.array(line) for line in lists]


def photographs(found: dict[str, Any], output: Path) -> None:
    """Fourier and variance of a ViT on real photographs, as published and corrected."""
    kinds = found["kinds"]
    figure = sheet(12.5, 7.4)
    rows = figure.subplots(2, 3, width_ratios=[1, 1.25, 1.25])
    for axes, variant in zip(rows, ("corrected", "paper"), strict=True):
        part = found[variant]
        lines = arrays(part["amplitude"])
        frequency = [np.array(part["frequency"])] * len(lines)
        draw.fourier_lines(axes[0], frequency, lines, TITLES[variant])
        draw.depth_profile(axes[1], kinds, {"": [a[-1] for a in lines]}, HIGH)
        if variant == "corrected":
            draw.depth_profile(axes[2], kinds, {"": part["variance"]}, VARYING)
            continue
        values = {
            "all channels": part["variance"],
            "without the largest": found["variance_without_largest_channel"],
        }
        draw.depth_profile(axes[2], kinds, values, "feature map variance", log=True)
    save(figure, output / "dynamics_photographs.png")

    figure = sheet(9.6, 3.5)
    left, right = figure.subplots(1, 2)
    share = found["paper"]["largest_channel"]
    draw.depth_profile(left, kinds, {"": share}, "share of the variance in one channel")
    left.set_ylim(0, 1.02)
    sizes = {"": found["largest_activation"]}
    draw.depth_profile(right, kinds, sizes, "largest activation", log=True)
    save(figure, output / "dynamics_large_activations.png")


def fourier_and_variance(models: dict[str, Any], output: Path) -> None:
    """One row a model: spectra, high frequencies by depth, variance by depth."""
    figure = sheet(12.5, 3.5 * len(models))
    rows = figure.subplots(len(models), 3, squeeze=False, width_ratios=[1, 1.25, 1.25])
    for axes, (name, found) in zip(rows, models.items(), strict=True):
        kinds = [kind for kind, _ in found["steps"]]
        lines = arrays(found["fourier"]["amplitude"])
        draw.fourier_lines(axes[0], arrays(found["fourier"]["frequency"]), lines, name)
        draw.depth_profile(axes[1], kinds, {name: [a[-1] for a in lines]}, HIGH)
        draw.depth_profile(axes[2], kinds, {name: found["varying"]}, VARYING)
    save(figure, output / "dynamics_fourier_variance.png")


def patterns(models: dict[str, Any], output: Path) -> None:
    """Which steps each model is made of."""
    figure = sheet(7.2, 0.55 * len(models) + 1.0)
    draw.step_pattern(
        figure.subplots(), {n: [kind for kind, _ in f["steps"]] for n, f in models.items()}
    )
    save(figure, output / "dynamics_patterns.png")


def loss(models: dict[str, Any], output: Path) -> None:
    """Surfaces, contours, Hessian spectra and trajectories."""
    figure = sheet(3.3 * len(models), 6.2)
    highest = [float(np.quantile(f["landscape"]["loss"], 0.75)) for f in models.values()]
    for i, (name, found) in enumerate(models.items()):
        along = np.array(found["landscape"]["axis"])
        values = np.array(found["landscape"]["loss"])
        surface = figure.add_subplot(2, len(models), i + 1, projection="3d")
        landscapes.landscape_surface(surface, along, values, max(highest), name)
        contour = figure.add_subplot(2, len(models), len(models) + i + 1)
        landscapes.landscape_contour(contour, along, values)
    save(figure, output / "dynamics_landscapes.png")

    figure = sheet(0.2 + 3.1 * len(models), 3.1)
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for i, (axis, (name, found)) in enumerate(zip(axes, models.items(), strict=True)):
        values = torch.tensor(found["hessian"]["eigenvalues"])
        margin = 0.12 * float(values.max() - values.min())
        points = torch.linspace(float(values.min()) - margin, float(values.max()) + margin, 400)
        heights = {name: density(values, points).numpy()}
        landscapes.eigenvalue_density(
            axis, points.numpy(), heights, {name: values.numpy()}, first_colour=i
        )
    save(figure, output / "dynamics_hessian.png")


def training(models: dict[str, Any], output: Path) -> None:
    """The way through weight space, and the Hessian on it."""
    figure = sheet(11.5, 3.9)
    paths = {n: f["trajectory"] for n, f in models.items() if f["trajectory"]}
    places = figure.add_gridspec(1, 3)
    landscapes.polar_path(
        figure.add_subplot(places[0], projection="polar"),
        {n: (np.array(p["radius"]), np.array(p["angle"])) for n, p in paths.items()},
    )
    for i, (key, label) in enumerate(
        (("largest_eigenvalue", "largest eigenvalue"), ("accuracy", "test accuracy (%)"))
    ):
        scale = 100 if key == "accuracy" else 1
        lines = {n: (np.array(p["seen"]), scale * np.array(p[key])) for n, p in paths.items()}
        axis = figure.add_subplot(places[i + 1])
        landscapes.by_epoch(axis, lines, label, log=key == "largest_eigenvalue")
    save(figure, output / "dynamics_training.png")


def behaviour(models: dict[str, Any], output: Path) -> None:
    """Frequency noise, robustness, lesions and CKA."""
    figure = sheet(12.5, 3.6)
    axes = figure.subplots(1, 3)
    first = next(iter(models.values()))
    draw.frequency_noise_lines(
        axes[0],
        np.array(first["frequency_noise"]["frequency"]),
        {n: np.array(f["frequency_noise"]["accuracy"]) for n, f in models.items()},
    )
    tables = {n: np.array(list(f["robustness"].values())) for n, f in models.items()}
    for axis, column, label in (
        (axes[1], 0, "accuracy (%)"), (axes[2], 2, "calibration error (%)")
    ):  # fmt: skip
        values = {n: 100 * t[..., column] for n, t in tables.items()}
        landscapes.robustness_lines(axis, values, label)
    save(figure, output / "dynamics_robustness.png")
    figure = sheet(3.6 * len(models), 6.4)
    rows = figure.subplots(2, len(models), squeeze=False)
    for i, (name, found) in enumerate(models.items()):
        parts = found["lesion"]["parts"]
        draw.lesion_bars(
            rows[0, i], [p[0] for p in parts], [p[1] for p in parts], [p[3] for p in parts],
            found["lesion"]["whole"], name,
        )  # fmt: skip
        draw.similarity_matrix(rows[1, i], np.array(found["cka"]), (name, name))
    save(figure, output / "dynamics_lesion_cka.png")


@click.command()
@click.option("--photographs", "file", type=click.Path(exists=True, path_type=Path))
@click.option("--trained", type=click.Path(exists=True, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(file: Path | None, trained: Path | None, output: Path) -> None:
    """Draw the figures of whatever measurements are given."""
    if file is not None:
        photographs(json.loads(file.read_text()), output)
    if trained is not None:
        files = {name: trained / f"{key}.json" for key, name in NAMES.items()}
        models = {n: json.loads(f.read_text()) for n, f in files.items() if f.is_file()}
        for figure in (fourier_and_variance, patterns, loss, training, behaviour):
            figure(models, output)


if __name__ == "__main__":
    main()
