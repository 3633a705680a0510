"""Write the tables of docs/arena.md from the committed results of the arena.

    python benchmarks/arena_page.py

Results lie in benchmarks/results/arena/arena_NAME.json, and many_classes.json beside that folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from page_tables import markdown, written

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "arena.md"
PHOTOGRAPHS, SCENES = "vit_tiny_patch16_224", "scenes"
GAPS = ("tokens/accuracy/gap", "tokens/probability/gap")
OURS = ("PatchImportance", "MemoryPatchImportance", "ClassEmbeddingGradient")


def methods(name: str) -> dict[str, dict[str, Any]]:
    """The rows of an arena, the most faithful first."""
    document = json.loads((RESULTS / "arena" / f"arena_{name}.json").read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = document["methods"]
    return dict(sorted(rows.items(), key=lambda row: -mean(row[1], GAPS[0])))


def mean(row: dict[str, Any], measure: str) -> float:
    """The mean of a measure over images."""
    return float(row["measures"][measure]["mean"])


def title(name: str, row: dict[str, Any], most: int) -> str:
    """The method's name, and on how many images it ran if not on all."""
    shown = f"`{name}`" if name in OURS else name
    return shown if row["images"] == most else f"{shown} ({row['images']} images)"


def times(cost: float) -> str:
    """A multiple of one forward pass."""
    return f"{cost:.2f}" if cost < 10 else f"{cost:.0f}"


def measures(name: str, heads: dict[str, str]) -> str:
    """Means of some measures, and the time of one map."""
    rows = methods(name)
    most = max(row["images"] for row in rows.values())
    lines = [
        [title(n, row, most), *(f"{mean(row, m):.3f}" for m in heads), times(row["cost"]["time"])]
        for n, row in rows.items()
    ]
    if "localisation/energy" in heads:
        (area,) = {
            f"{mean(r, 'localisation/box_area'):.3f}" for r in rows.values() if r["images"] == most
        }
        shown = [area if m == "localisation/energy" else "" for m in heads]
        lines.append(["a uniform map", *shown, ""])
    return markdown(["method", *heads.values(), "time"], lines)


def differences(name: str, keys: Sequence[str] = GAPS) -> str:
    """PatchImportance minus each other method, on the images both have."""
    lines = []
    for method, row in methods(name).items():
        against = row["patch_importance_minus_this"]
        if against:
            found = (against[key] for key in keys)
            shown = [f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in found]
            lines.append([f"`{method}`" if method in OURS else method, *shown])
    return markdown(["method", "accuracy", "probability"], lines)


def published_areas() -> str:
    """Areas of the mean accuracy curve, as Vilas et al. publish them."""
    lines = []
    for model, name in (("ViT-Ti/16", PHOTOGRAPHS), ("packaged ViT", SCENES)):
        rows = methods(name)
        for method in ("ClassEmbeddingGradient", "Chefer relevance", "linear probes"):
            if method in rows:
                row = rows[method]
                areas = [f"{row[f'paper_{side}']:.3f}" for side in ("negative", "positive")]
                lines.append([model, f"`{method}`" if method in OURS else method, *areas])
    return markdown(["model", "method", "negative ↑", "positive ↓"], lines)


def many_classes() -> str:
    """What the maps of all classes cost."""
    found = json.loads((RESULTS / "many_classes.json").read_text(encoding="utf-8"))
    passes, faster = found["ours_in_forward_passes"], found["times_faster_than_fastest_peer"]
    lines = [[f"`{name}`", f"{passes[name]:.1f}", f"{faster[name]:.0f}"] for name in passes]
    peer = found["fastest_peer"]
    lines.append([peer, f"{found['peers_seconds'][peer] / found['forward_seconds']:.0f}", "1"])
    return markdown(["method", "forward passes", "times faster"], lines)


LOCALISATION = {"localisation/energy": "energy in box", "localisation/pointing": "pointing game"}
EXACT = {
    "localisation/average_precision": "average precision",
    "localisation/context_share": "share on the context",
    "localisation/pointing": "pointing game",
}
HEADS = dict(zip(GAPS, ("gap, accuracy", "gap, probability"), strict=True))
TABLES: dict[str, Callable[[], str]] = {
    "photographs": partial(measures, PHOTOGRAPHS, HEADS | LOCALISATION),
    "photographs: differences": partial(differences, PHOTOGRAPHS),
    "scenes": partial(measures, SCENES, HEADS | EXACT),
    "scenes: differences": partial(differences, SCENES),
    "published areas": published_areas,
    "many classes": many_classes,
}


@click.command()
def main() -> None:
    """Write the page's tables."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")


if __name__ == "__main__":
    main()
