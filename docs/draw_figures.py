"""Draw the figures of the concepts page: `python docs/draw_figures.py`, on the packaged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from captum_classemb import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.data import Preprocess, read_image
from captum_classemb.models import DEMO_CLASSES, demo_image_paths, demo_vit
from captum_classemb.plot import DIVERGING, overlay_map
from captum_classemb.vit import adapt, record

FIGURES = Path(__file__).parent / "figures"
FOR, AGAINST, INK, FAINT = "#D55E00", "#0072B2", "#333333", "#767676"
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "savefig.dpi": 150,
}

model = demo_vit()
vit = adapt(model)
preprocess = Preprocess.of_model(model)
view = preprocess.view(read_image(demo_image_paths()[0]))
inputs = preprocess.tensor(view)[None]
target = int(model(inputs).argmax())


def bare(axis: Axes) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def save(figure: Figure, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png")


def draw_methods() -> None:
    methods = {
        "PatchImportance": PatchImportance(model),
        "ClassEmbeddingGradient": ClassEmbeddingGradient(model),
        "MemoryPatchImportance": MemoryPatchImportance(model),
        "ClassEmbeddingProjection": ClassEmbeddingProjection(model),
    }
    figure = Figure(figsize=(9.6, 2.1), layout="constrained")
    first, *others = axes = figure.subplots(1, 5)
    first.imshow(view)
    first.set_title(f"“{DEMO_CLASSES[target]}”", fontsize=8.5)
    bare(first)
    for axis, (title, method) in zip(others, methods.items(), strict=True):
        overlay_map(axis, view, method.attribute_classes(inputs, [target])[0, 0], smooth=False)
        axis.set_title(title, fontsize=8.5)
    scale = ScalarMappable(Normalize(-1, 1), DIVERGING)
    bar = figure.colorbar(scale, ax=axes, aspect=20, shrink=0.92, pad=0.01, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["against", "0", "for"], fontsize=8)
    bar.ax.tick_params(length=0, labelcolor=INK)
    bar.outline.set_visible(False)
    save(figure, "methods")


def draw_projection() -> None:
    """The first choice of every patch after every block; the correct class in colour."""
    figure = Figure(figsize=(9.6, 1.9), layout="constrained")
    axes = figure.subplots(1, 7)
    axes[0].imshow(view)
    bare(axes[0])
    for block, (axis, hidden) in enumerate(
        zip(axes[1:], record(vit, inputs, ["resid_post"])["resid_post"], strict=True)
    ):
        with torch.no_grad():
            shares = vit.readout.project(hidden)[0, vit.prefix_tokens :].softmax(-1)
        share = shares[:, target].view(8, 8)
        axis.imshow(share, cmap="Oranges", vmin=0, vmax=1)
        for place, best in enumerate(shares.argmax(-1).tolist()):
            row, column = divmod(place, 8)
            right = best == target
            axis.text(
                column, row, str(best), ha="center", va="center", fontsize=6.5,
                weight="bold" if right else "normal",
                color="white" if share[row, column] > 0.6 else INK if right else FAINT,
            )  # fmt: skip
        axis.set_title(f"block {block}")
        bare(axis)
    save(figure, "projection")


def draw_ledger() -> None:
    ledger = MemoryPatchImportance(model).ledger(inputs, target=target)
    terms = [("embedding", float(ledger.embedding))]
    for block in range(len(vit.blocks)):
        terms.append((f"attention {block}", float(ledger.attention[0, block].sum())))
        terms.append((f"MLP {block}", float(ledger.mlp[0, block])))
    terms.append(("biases", float(ledger.bias)))
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    axis = figure.subplots()
    level = 0.0
    for place, (_, value) in enumerate(terms):
        axis.bar(place, value, bottom=level, color=FOR if value > 0 else AGAINST, width=0.75)
        axis.plot([place, place + 1], [level + value] * 2, color=FAINT, linewidth=0.7, zorder=0)
        level += value
        top = max(level, level - value, 0.0)
        axis.text(place, top + 0.15, f"{value:+.1f}".replace("-", "−"), ha="center", fontsize=7.5)
    axis.bar(len(terms), level, color="#555555", width=0.75)
    axis.text(len(terms), level + 0.15, f"{level:.1f}", ha="center", fontsize=7.5)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.margins(y=0.08)
    labels = [*(name for name, _ in terms), "logit"]
    axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_ylabel(f"logit of “{DEMO_CLASSES[target]}”")
    axis.tick_params(axis="x", length=0)
    save(figure, "ledger")


with mpl.rc_context(STYLE):
    draw_methods()
    draw_projection()
    draw_ledger()
