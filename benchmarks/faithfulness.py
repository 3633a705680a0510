"""Who explains best, at what cost: the study ``faithfulness`` on photographs and on scenes.

    python benchmarks/faithfulness.py run --photographs FOLDER --checkpoint FILE
    python benchmarks/faithfulness.py page

``run`` makes four runs of the study in benchmarks/results/faithfulness, and says the command of
each; the methods of ``SLOW`` have runs of their own on fewer images. A run that is there is not
made again, one that was interrupted goes on. Times are those of an idle machine, or of none.
``page`` writes the tables of docs/arena.md from them and from many_classes.json. Choose designs on
the even half of the photographs (``study faithfulness --half even``): the odd half is the report's.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import compared  # noqa: F401  (registers methods of other packages)
import torch
from page_tables import markdown, written

from captum_classemb.attr import METHODS
from captum_classemb.evaluation.areas import area
from captum_classemb.runs import read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = RESULTS / "faithfulness"
PAGE = ROOT / "docs" / "arena.md"

FIRST = "patch-importance"
OURS = (FIRST, "memory-patch-importance", "class-embedding-gradient")
OTHERS = (
    "all-path-importance", "chefer", "libra-fullgrad", "cp-lrp", "legrad", "rollout",
    "raw-attention", "grad-cam",
    "captum-input-x-gradient", "captum-saliency", "pytorch-grad-cam", "legrad-torch",
    "lxt-cp-lrp", "lxt-attnlrp",
)  # fmt: skip
SLOW = ("token-occlusion", "captum-integrated-gradients", "captum-feature-ablation")
GAPS = ("accuracy/gap", "probability/gap")
HEADS = {"accuracy/gap": "gap, accuracy", "probability/gap": "gap, probability"}
PLACES = {"energy": "energy in box", "pointing": "pointing game"}
MASKS = {"average_precision": "average precision", "pointing": "pointing game"}


@click.group()
def main() -> None:
    """Runs of the study of faithfulness, and the page that tells of them."""


@main.command()
@click.option("--photographs", type=click.Path(path_type=Path), help="Photographs with boxes.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of ViT-Ti/16.")
@click.option("--probe", type=click.Path(path_type=Path), help="Linear probes for the scenes.")
@click.option("--images", default=200, show_default=True, help="Images of a run.")
@click.option("--output", type=click.Path(path_type=Path), default=RUNS, show_default=True)
def run(
    photographs: Path | None,
    checkpoint: Path | None,
    probe: Path | None,
    images: int,
    output: Path,
) -> None:
    """Make the runs that are not there yet."""
    scenes = ["--model", "demo_vit", "--data", "scenes", "--limit"]
    probed = ["--probe", str(probe), "--method", "linear-probe"] if probe else []
    quick, slow = (*OURS, *OTHERS), (FIRST, *SLOW)
    runs = {
        "scenes": [*scenes, str(images), *_methods(quick), *probed],
        "scenes_slow": [*scenes, str(images // 4), *_methods(slow)],
    }
    if photographs is not None:
        own = ["--model", "vit_tiny_patch16_224", "--checkpoint", str(checkpoint)]
        own += ["--data", str(photographs), "--resize", "squash", "--half", "odd", "--limit"]
        # Half of the images that are taken have an odd index.
        runs["photographs"] = [*own, str(2 * images), *_methods(quick)]
        runs["photographs_slow"] = [*own, str(images // 2), *_methods(slow)]
    for name, options in runs.items():
        shared = ["--cost", "--batch-size", "16", "--resume", "--output", str(output / name)]
        axioms = [] if name.endswith("slow") else ["--axioms"]
        command = ["benchmarks/compared.py", "study", "faithfulness", *options, *axioms, *shared]
        click.echo("python " + shlex.join(command))
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def _methods(names: Sequence[str]) -> list[str]:
    for name in (name for name in names if name not in METHODS):
        click.echo(f"{name} is left out: its package is not installed.", err=True)
    return [word for name in names if name in METHODS for word in ("--method", name)]


# -- The page


def values(name: str) -> dict[str, float]:
    """The areas of a run and of its slow methods, by metric."""
    found = {row.metric: row.value for row in read_rows(RUNS / name / "areas.csv")}
    slow = read_rows(RUNS / f"{name}_slow" / "areas.csv")
    return found | {r.metric: r.value for r in slow if r.metric.split("/")[0] in SLOW}


def methods(found: dict[str, float]) -> list[str]:
    """The methods, the most faithful first."""
    names = [key.removesuffix("/accuracy/gap") for key in found if key.endswith("/accuracy/gap")]
    return sorted(names, key=lambda name: -found[f"{name}/accuracy/gap"])


def measures(name: str, heads: dict[str, str]) -> str:
    """Means of some measures, and the time of one map."""
    found = values(name)
    lines = []
    for method in methods(found):
        cells = [f"{found[f'{method}/{key}']:.3f}" for key in heads]
        time = found[f"{method}/cost/time"]
        shown = f"{time:.2f}" if time < 10 else f"{time:.0f}"
        lines.append([f"`{method}`", *cells, shown])
    return markdown(["method", *heads.values(), "time"], lines)


def differences(name: str) -> str:
    """The first method minus each other one, on the images both have."""
    found = values(name)
    lines = []
    for method in (method for method in methods(found) if method != FIRST):
        ends = ("", "/low", "/high")
        each = [[found[f"{method}/{gap}/first_minus_this{e}"] for e in ends] for gap in GAPS]
        lines.append([f"`{method}`", *(f"{m:+.3f} [{lo:+.3f}, {hi:+.3f}]" for m, lo, hi in each)])
    return markdown(["method", "accuracy", "probability"], lines)


def published_areas() -> str:
    """Areas of the mean accuracy curve, as Vilas et al. publish them."""
    lines = []
    for model, name, patches in (("ViT-Ti/16", "photographs", 196), ("demo_vit", "scenes", 64)):
        rows = read_rows(RUNS / name / "curves.csv")
        for method in ("class-embedding-gradient", "chefer", "linear-probe"):
            sides = []
            for side in ("negative", "positive"):
                head = f"{method}/accuracy/{side}@"
                points = [
                    (float(r.metric[len(head) :]), r.value)
                    for r in rows
                    if r.metric.startswith(head)
                ]
                if points:
                    shares, curve = torch.tensor(points, dtype=torch.float64).T
                    removed = (shares * patches).round().long()
                    sides.append(f"{float(area(removed, curve, patches, 'paper')):.3f}")
            if sides:
                lines.append([model, f"`{method}`", *sides])
    return markdown(["model", "method", "negative ↑", "positive ↓"], lines)


def many_classes() -> str:
    """What the maps of all classes cost."""
    found: dict[str, Any] = json.loads((RESULTS / "many_classes.json").read_text(encoding="utf-8"))
    passes, faster = found["ours_in_forward_passes"], found["times_faster_than_fastest_peer"]
    lines = [[f"`{name}`", f"{passes[name]:.1f}", f"{faster[name]:.0f}"] for name in passes]
    peer = found["fastest_peer"]
    lines.append([peer, f"{found['peers_seconds'][peer] / found['forward_seconds']:.0f}", "1"])
    return markdown(["method", "forward passes", "times faster"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "photographs": partial(measures, "photographs", HEADS | PLACES),
    "photographs: differences": partial(differences, "photographs"),
    "scenes": partial(measures, "scenes", HEADS | MASKS),
    "scenes: differences": partial(differences, "scenes"),
    "published areas": published_areas,
    "many classes": many_classes,
}


@main.command()
def page() -> None:
    """Write the page's tables."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")


if __name__ == "__main__":
    main()
