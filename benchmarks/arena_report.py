"""Tables and figures of the arena from the rows of its methods."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from arena_methods import Method
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from captum_classemb.edit.tokens import removable_tokens
from captum_classemb.evaluation.areas import area, removal_counts
from captum_classemb.evaluation.bootstrap import Interval, bootstrap_mean, paired_difference
from captum_classemb.evaluation.removal_order import MEASURES

OURS = "PatchImportance"
CURVES = {
    "tokens": "token removal, target = label",
    "tokens_predicted": "token removal, target = predicted class",
    "pixels_mean": "pixels painted in the mean colour, target = label",
    "pixels_blur": "pixels blurred, target = label",
}
LOCALISATION = ("energy", "box_area", "pointing", "average_precision", "context_share")
AXIOMS = {
    "infidelity": "infidelity (lower is better)",
    "sensitivity": "max-sensitivity (lower is better)",
    "randomised": "rank correlation with a shuffled model's map (near 0 is right)",
}


def image_values(arena: Any, rows: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """One value an image for every measure, NaN where an image does not count."""
    size = (arena.images.shape[2], arena.images.shape[3])
    h, w = arena.vit.grid(size)
    values: dict[str, Tensor] = {}
    for curve in CURVES:
        points = torch.from_numpy(rows[curve])
        most = removable_tokens(arena.vit, size) if curve.startswith("tokens") else h * w
        removed = removal_counts(most, points.shape[2])
        for m, measure in enumerate(MEASURES):
            sides = area(removed, points[..., m], h * w, "trapezoid")
            values[f"{curve}/{measure}/negative"] = sides[:, 0]
            values[f"{curve}/{measure}/positive"] = sides[:, 1]
            values[f"{curve}/{measure}/gap"] = sides[:, 0] - sides[:, 1]
    if arena.exact:
        # The context of these scenes says nothing of the class, so nothing should rest on it.
        rows = rows | {"context_share": 1 - rows["energy"]}
    for name in LOCALISATION:
        if name in rows:
            values[f"localisation/{name}"] = torch.from_numpy(rows[name]).double()
    for name in AXIOMS:
        if name in rows:
            values[f"axioms/{name}"] = torch.from_numpy(rows[name]).double()
    return values


def paper_areas(arena: Any, rows: dict[str, np.ndarray]) -> tuple[float, float]:
    """Negative and positive area of the mean accuracy curve, as Vilas et al. publish it."""
    size = (arena.images.shape[2], arena.images.shape[3])
    h, w = arena.vit.grid(size)
    mean = torch.from_numpy(rows["tokens"]).double().mean(0)[..., 0]
    removed = removal_counts(removable_tokens(arena.vit, size), mean.shape[1])
    negative, positive = area(removed, mean, h * w, "paper").tolist()
    return negative, positive


def summarise(values: Tensor) -> Interval:
    """Mean and interval over the images that count."""
    return bootstrap_mean(values[~values.isnan()])


def difference(first: Tensor, second: Tensor) -> Interval:
    """Paired difference over the images both have."""
    count = min(len(first), len(second))
    first, second = first[:count], second[:count]
    both = ~(first.isnan() | second.isnan())
    return paired_difference(first[both], second[both])


def report(
    arena: Any,
    methods: Sequence[Method],
    results: dict[str, dict[str, np.ndarray]],
    output: Path,
    name: str,
) -> None:
    """Write ``arena_NAME`` as CSV, JSON and Markdown, the Pareto plot and the example sheet."""
    output.mkdir(parents=True, exist_ok=True)
    values = {m.name: image_values(arena, results[m.name]) for m in methods}
    table, records = [], {}
    for method in methods:
        rows, mine = results[method.name], values[method.name]
        means = {key: summarise(value) for key, value in mine.items()}
        cost = {k: float(rows[f"cost_{k}"]) for k in ("forward_passes", "backward_passes", "time")}
        cost |= {"memory": float(rows["cost_memory"]), "ms": float(rows["cost_milliseconds"])}
        published = paper_areas(arena, rows)
        against = {}
        if OURS in values and method.name != OURS:
            against = {k: difference(values[OURS][k], mine[k])._asdict() for k in mine}
        records[method.name] = {
            "one_pass": method.one_pass,
            "images": len(rows["tokens"]),
            "cost": cost,
            "paper_negative": published[0],
            "paper_positive": published[1],
            "measures": {k: v._asdict() for k, v in means.items()},
            "patch_importance_minus_this": against,
            **{k: float(rows[k]) for k in ("pixel_accuracy", "mean_iou") if k in rows},
        }
        table += [{"method": method.name, "measure": k, **v._asdict()} for k, v in means.items()]
        table += [
            {"method": method.name, "measure": f"cost/{k}", "mean": v} for k, v in cost.items()
        ]
    with (output / f"arena_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["method", "measure", "mean", "low", "high", "images"])
        writer.writeheader()
        writer.writerows(table)
    command = "python " + shlex.join(_public(a) for a in sys.argv)
    document = {"command": command, "settings": arena.settings, "methods": records}
    (output / f"arena_{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    markdown = _markdown(command, arena.settings, records)
    (output / f"arena_{name}.md").write_text(markdown)
    print(markdown)
    pareto(records, arena.settings, output / f"arena_{name}_pareto.png")
    if not arena.settings.get("private_images", not arena.exact):
        sheet(arena, methods, results, output / f"arena_{name}_maps.png")


def _public(argument: str) -> str:
    """Folders of this machine have no place in a result file."""
    return Path(argument).name if argument.startswith("/") else argument


def _cell(record: dict[str, Any], key: str, digits: int = 3) -> str:
    found = record["measures"].get(key)
    return "" if found is None else f"{found['mean']:.{digits}f}"


def _markdown(command: str, settings: dict[str, Any], records: dict[str, Any]) -> str:
    ordered = sorted(records, key=lambda n: -records[n]["measures"]["tokens/accuracy/gap"]["mean"])
    lines = [
        f"# Arena: {settings['model']}, {settings['data']}",
        "",
        f"`{command}`",
        "",
        f"{settings['images']} images on {settings['device']}, torch {settings['torch']}; curves "
        f"in {settings['evaluation_dtype']}, {settings['steps']} evenly spaced points of token "
        f"removal, {settings['pixel_steps']} of pixel masking on {settings['pixel_images']} "
        "images. Areas: trapezoid convention. Cost: multiples of one forward pass of the same "
        "batch.",
        "",
        "## Token removal, target = label",
        "",
        "| method | acc. negative | acc. positive | acc. gap | prob. gap | logit gap | forward "
        "| backward | time | memory | images |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ordered:
        r = records[name]
        c = r["cost"]
        cells = [_cell(r, f"tokens/accuracy/{side}") for side in ("negative", "positive", "gap")]
        cells += [_cell(r, f"tokens/{m}/gap") for m in ("probability", "logit")]
        cells += [f"{c[k]:.2f}" for k in ("forward_passes", "backward_passes", "time", "memory")]
        lines.append(f"| {name} | {' | '.join(cells)} | {r['images']} |")
    lines += ["", "## The other gaps, and localisation", ""]
    keys = [f"{curve}/{m}/gap" for curve in list(CURVES)[1:] for m in ("accuracy", "probability")]
    keys += [f"localisation/{k}" for k in LOCALISATION]
    keys = [k for k in keys if k in records[ordered[0]]["measures"]]
    heads = [_head(k) for k in keys]
    heads += ["paper neg.", "paper pos."]
    exact = "pixel_accuracy" in records[ordered[0]]
    heads += ["pixel accuracy", "mean IoU"] if exact else []
    lines += [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in ordered:
        r = records[name]
        cells = [_cell(r, k) for k in keys]
        cells += [f"{r['paper_negative']:.3f}", f"{r['paper_positive']:.3f}"]
        cells += [f"{r[k]:.3f}" for k in ("pixel_accuracy", "mean_iou") if exact]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "The last areas are those of the mean accuracy curve as Vilas et al. publish them.",
        "",
        f"## Axioms, on {_axiom_images(records)} images; methods of more than 50 passes left out",
        "",
        f"| method | {' | '.join(AXIOMS.values())} |",
        "|---" * (len(AXIOMS) + 1) + "|",
    ]
    for name in ordered:
        if "axioms/infidelity" in records[name]["measures"]:
            cells = [_cell(records[name], f"axioms/{k}") for k in AXIOMS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if OURS in records:
        lines += ["", f"## {OURS} minus each, on common images (95 % paired bootstrap)", ""]
        keys = [f"{c}/{m}/gap" for c in CURVES for m in ("accuracy", "probability")]
        keys += [f"localisation/{k}" for k in LOCALISATION if k != "box_area"]
        keys = [k for k in keys if k in records[OURS]["measures"]]
        heads = [_head(k) for k in keys]
        lines += [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name in ordered:
            against = records[name]["patch_importance_minus_this"]
            if against:
                cells = [
                    f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
                    for d in (against[k] for k in keys)
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _head(key: str) -> str:
    return key.replace("/gap", "").replace("localisation/", "").replace("/", " ").replace("_", " ")


def _axiom_images(records: dict[str, Any]) -> int:
    """How many images the axioms were measured on."""
    counts = [
        r["measures"]["axioms/infidelity"]["images"]
        for r in records.values()
        if "axioms/infidelity" in r["measures"]
    ]
    return max(counts, default=0)


def pareto(records: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Faithfulness against cost, one point a method."""
    shown = {n: r for n, r in records.items() if n != "random order"}
    # Names are placed in pixels: those of the file.
    figure, axes = plt.subplots(figsize=(8.2, 5.2), dpi=150, constrained_layout=True)
    points = []
    for name, r in shown.items():
        gap, cost = r["measures"]["tokens/accuracy/gap"], max(r["cost"]["time"], 0.9)
        colour = "#b2182b" if name == OURS else "#2166ac" if r["one_pass"] else "#777777"
        spread = [[gap["mean"] - gap["low"]], [gap["high"] - gap["mean"]]]
        axes.errorbar(
            cost, gap["mean"], spread, fmt="o", color=colour, ms=8 if name == OURS else 6,
            elinewidth=1, capsize=2, alpha=0.9,
        )  # fmt: skip
        points.append((cost, gap["mean"], name, colour))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("time of one map, in forward passes (log scale)")
    axes.set_ylabel("gap: negative − positive area, accuracy")
    axes.set_title(f"Faithfulness against cost: {settings['model']}, {settings['data']}")
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.4, y=0.12)
    figure.canvas.draw()
    _label(axes, points)
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=c, label=t)
        for c, t in (
            ("#b2182b", OURS),
            ("#2166ac", "one forward pass"),
            ("#777777", "more passes"),
        )
    ]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path)
    plt.close(figure)


def _label(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside their points, moved apart where they would lie over one another."""
    to_pixels, height = axes.transData.transform, 23.0
    # A point takes room too: a left edge, a height and a width.
    marks = [to_pixels((x, y)) for x, y, _, _ in points]
    placed: list[tuple[float, float, float]] = [(px - 11, py, 22) for px, py in marks]
    for x, y, name, colour in sorted(points, key=lambda p: -p[1]):
        px, py = to_pixels((x, y))
        width = 9.6 * len(name) + 8
        moves = [(0.0, s) for s in (0, 1, -1, 2, -2, 3, -3, 4, -4)]
        # The cheapest methods stand in a column at the left: their names go outside of it.
        for side in (-1, 1) if x < 2 else (1, -1):
            for _, step in moves:
                left = px + 13 if side == 1 else px - 13 - width
                ty = py + step * height
                free = all(
                    abs(ty - oy) >= height or left > ox + ow or left + width < ox
                    for ox, oy, ow in placed
                )
                if free:
                    break
            if free:
                break
        placed.append((left, ty, width))
        axes.annotate(
            name, (x, y), xytext=((left - px + (0 if side == 1 else width)), ty - py),
            textcoords="offset pixels", ha="left" if side == 1 else "right", va="center",
            fontsize=8.5, color=colour,
            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.6},
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour, "alpha": 0.5}
            if step else None,
        )  # fmt: skip


def sheet(
    arena: Any, methods: Sequence[Method], results: dict[str, dict[str, np.ndarray]], path: Path
) -> None:
    """Example maps side by side: a row an image, a column a method, in two banks."""
    names = [m.name for m in methods if m.name != "random order"]
    rows, columns = min(4, len(arena.images)), -(-len(names) // 2)
    figure = plt.figure(
        figsize=(1.25 * (columns + 1), 2 * (1.25 * rows + 0.5)), constrained_layout=True
    )
    for bank, some in zip(figure.subfigures(2, 1), (names[:columns], names[columns:]), strict=True):
        axes = bank.subplots(rows, columns + 1, squeeze=False)
        for i in range(rows):
            picture = arena.images[i].cpu().permute(1, 2, 0).float()
            picture = (picture - picture.min()) / (picture.max() - picture.min())
            axes[i, 0].imshow(picture)
            for k, name in enumerate(some, 1):
                scores = np.maximum(results[name]["maps"][i], 0)
                top = max(np.quantile(scores, 0.99), 1e-12)
                axes[i, k].imshow(scores, cmap="magma", vmin=0, vmax=top)
        for axis in axes.flat:
            axis.set_axis_off()
        for k, name in enumerate(["image", *some]):
            words = name.replace("ClassEmbedding", "ClassEmbedding ").replace("Patch", " Patch")
            words = words.replace("Relevance", "").strip().replace(" ", "\n", 2)
            axes[0, k].set_title(words, fontsize=7.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)
