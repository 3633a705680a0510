"""The arena: who explains best, at what cost, on the same images, in one run.

    python benchmarks/arena.py --data FOLDER --checkpoint FILE
    python benchmarks/arena.py --scenes --probe probes/probes.safetensors

Other packages' own code has rows where it is installed: ``pip install -e ".[bench,peers]"``, and
``pip install --no-deps lxt``, whose rules alone are read. Linear probes have a row where they were
fitted before, never on the images of the report:

    captum-classemb study linear-probing --model demo_vit --data scenes:val \\
        --train-data scenes:train --save-probes --output probes

Images of a folder with boxes (layout ``annotations``) are split by index: choose designs on the
even half, report on the odd one. Every part of a method's row is kept as soon as it is there, so
an interrupted run goes on where it stopped; ``--part costs`` alone, on an idle machine, gives times
that nothing disturbed. The report is written when curves and costs are there.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from arena_axioms import measure as measure_axioms
from arena_cost import measure as measure_cost
from arena_methods import METHODS, Maps, Method, linear_probes
from arena_report import report
from torch import Tensor
from tqdm import tqdm

from captum_classemb.data import Preprocess, open_dataset
from captum_classemb.data.scenes import Scenes
from captum_classemb.evaluation import BoxLocalisation, MaskLocalisation
from captum_classemb.evaluation.removal_curves import removal_curves
from captum_classemb.models import demo_vit, load_model
from captum_classemb.vit import ViT, adapt

SLOW_LIMIT = 50
"""Images of methods that need more than 50 passes for one."""
COST_BATCH = 16
"""Images whose maps are timed together; one for slow methods."""
PARTS = {"curves": "curves_and_places", "axioms": "axioms", "costs": "costs"}


class Arena:
    """The images, the model that is explained, and a copy of it that is evaluated."""

    def __init__(
        self,
        vit: ViT,
        images: Tensor,
        labels: Tensor,
        masks: Tensor,
        exact: bool,
        settings: dict[str, Any],
    ) -> None:
        self.vit, self.images, self.labels, self.masks = vit, images, labels, masks
        self.exact, self.settings = exact, settings
        dtype = getattr(torch, settings["evaluation_dtype"])
        self.judge = adapt(copy.deepcopy(vit.model).to(dtype))
        with torch.no_grad():
            logits = [self.judge(chunk.to(dtype)) for chunk in images.split(16)]
        self.predicted = torch.cat(logits).argmax(1)

    def maps(self, make: Maps, images: Tensor, target: Tensor) -> Tensor:
        """Maps B×h×w, a few images at a time."""
        pairs = zip(images.split(8), target.split(8), strict=True)
        return torch.cat([make(x, t).detach().float() for x, t in pairs])

    def curves(self, maps: Tensor, target: Tensor, perturbation: Any, steps: int) -> Tensor:
        """Values of the removal curves, B×2×S×3."""
        count = len(maps)
        chunks = zip(self.images[:count].split(16), maps.split(16), target.split(16), strict=True)
        values = [
            removal_curves(self.judge, x, m, t, steps=steps, perturbation=perturbation).values
            for x, m, t in chunks
        ]
        return torch.cat(values)

    def costs(self, method: Method) -> dict[str, Tensor]:
        """Passes, time and memory."""
        batch = 1 if method.slow else COST_BATCH
        make = method.build(self.vit)
        cost = measure_cost(self.vit, make, self.images[:batch], self.labels[:batch])
        return {f"cost_{k}": torch.tensor(v) for k, v in asdict(cost).items()}

    def axioms(self, method: Method) -> dict[str, Tensor]:
        """Infidelity, sensitivity, and what shuffled weights leave of the maps, if it is quick."""
        return {} if method.slow else measure_axioms(method, self.vit, self.images, self.labels)

    def curves_and_places(self, method: Method) -> dict[str, Tensor]:
        """Removal curves and localisation, image by image."""
        make = method.build(self.vit)
        count = min(len(self.images), SLOW_LIMIT if method.slow else len(self.images))
        images, labels, masks = self.images[:count], self.labels[:count], self.masks[:count]
        predicted = self.predicted[:count]
        maps = self.maps(make, images, labels)
        steps, pixels = self.settings["steps"], min(count, self.settings["pixel_images"])
        rows = {"maps": maps, "tokens": self.curves(maps, labels, "tokens", steps)}
        rows["tokens_predicted"] = rows["tokens"].clone()
        wrong = predicted != labels
        if wrong.any():
            other = self.maps(make, images[wrong], predicted[wrong])
            kept = self.images
            self.images = images[wrong]
            rows["tokens_predicted"][wrong] = self.curves(other, predicted[wrong], "tokens", steps)
            self.images = kept
        for fill in ("mean", "blur"):
            half = self.settings["pixel_steps"]
            rows[f"pixels_{fill}"] = self.curves(maps[:pixels], labels[:pixels], fill, half)
        boxes = BoxLocalisation(*((0.0, 1.0) if self.exact else (0.05, 0.5)))
        boxes.update(maps, masks)
        rows |= boxes.images()
        if self.exact:
            exact = MaskLocalisation()
            exact.update(maps, masks)
            rows["average_precision"] = exact.images()["average_precision"]
            summary = exact.compute()
            rows |= {name: summary[name] for name in ("pixel_accuracy", "mean_iou")}
        return rows


def photographs(
    data: Path, checkpoint: Path | None, model: str, half: str, limit: int | None
) -> Any:
    """Model and images of a folder with boxes."""
    import timm

    net = load_model(model, checkpoint)
    config = timm.data.resolve_data_config({}, model=net)
    dataset = open_dataset(data, Preprocess.from_config(config, "squash"), classes=1000)
    start = {"even": 0, "odd": 1, "all": 0}[half]
    indices = list(range(start, len(dataset), 1 if half == "all" else 2))[:limit]
    samples = [dataset[i] for i in tqdm(indices, desc="reading", file=sys.stderr)]
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])
    masks = torch.stack([s.mask == 1 for s in samples if s.mask is not None])
    return adapt(net), images, labels, masks


def scenes(limit: int | None) -> Any:
    """The packaged model and scenes whose context says nothing about the class."""
    dataset = Scenes("test", context_correlation=0.0, transform=lambda image: (image - 0.5) / 0.5)
    samples = [dataset[i] for i in range(limit or 200)]
    images = torch.stack([s.image for s in samples])
    labels = torch.tensor([s.label for s in samples])
    masks = torch.stack([s.mask == 1 for s in samples if s.mask is not None])
    return adapt(demo_vit()), images, labels, masks


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="A folder of images with boxes.")
@click.option("--scenes", "use_scenes", is_flag=True, help="The packaged model on Scenes.")
@click.option("--model", default="vit_tiny_patch16_224", show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of the model.")
@click.option("--probe", type=click.Path(path_type=Path), help="Adds the row: linear probes.")
@click.option("--half", type=click.Choice(["even", "odd", "all"]), default="odd", show_default=True)
@click.option("--method", "chosen", multiple=True, help="Some methods only.")
@click.option(
    "--part",
    "parts",
    type=click.Choice(list(PARTS)),
    multiple=True,
    default=tuple(PARTS),
    help="Some parts of the rows only.",
)
@click.option("--limit", type=int, help="The first images only.")
@click.option("--steps", default=20, show_default=True, help="Points of token removal.")
@click.option("--pixel-steps", default=5, show_default=True, help="Points of pixel masking.")
@click.option("--pixel-images", default=50, show_default=True, help="Images of pixel masking.")
@click.option("--evaluation-dtype", default="bfloat16", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results"))
@click.option("--rows", type=click.Path(path_type=Path), help="Where unfinished rows are kept.")
def main(**options: Any) -> None:
    """Run every method that has no row yet, then write tables and figures."""
    if options["use_scenes"]:
        vit, images, labels, masks = scenes(options["limit"])
        name, data = "scenes", "Scenes, test split, context_correlation 0"
    else:
        arguments = (options[k] for k in ("data", "checkpoint", "model", "half", "limit"))
        vit, images, labels, masks = photographs(*arguments)
        name, data = options["model"], f"{options['half']}-index images"
    device = torch.device(options["device"])
    settings = {
        "model": "demo_vit" if options["use_scenes"] else options["model"],
        "data": data,
        "images": len(images),
        "device": options["device"],
        "torch": torch.__version__,
        **{k: options[k] for k in ("steps", "pixel_steps", "pixel_images", "evaluation_dtype")},
    }
    exact = options["use_scenes"]
    arena = Arena(
        adapt(vit.model.to(device)), images.to(device), labels.to(device), masks.to(device),
        exact, settings,
    )  # fmt: skip
    folder = options["rows"] or options["output"] / "rows" / f"{name}_{options['half']}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise click.UsageError(f"{folder} holds rows of other settings: give another --rows.")
    kept.write_text(json.dumps(settings, indent=1))
    probes = [linear_probes(options["probe"])] if options["probe"] else []
    wanted = [m for m in (*METHODS, *probes) if m.installed]
    if options["chosen"]:
        wanted = [m for m in wanted if m.name in options["chosen"]]
    results, missing = {}, False
    for method in tqdm(wanted, desc="methods", file=sys.stderr):
        rows: dict[str, np.ndarray] = {}
        for part, measured in PARTS.items():
            path = folder / f"{method.stem}.{part}.npz"
            if part in options["parts"] and not path.exists():
                unfinished = path.with_suffix(".tmp.npz")
                found = getattr(arena, measured)(method)
                np.savez_compressed(unfinished, **{k: v.cpu().numpy() for k, v in found.items()})
                unfinished.rename(path)
            missing |= part != "axioms" and not path.exists()
            if path.exists():
                rows |= dict(np.load(path))
        results[method.name] = rows
    if not missing:
        report(arena, wanted, results, options["output"], name)


if __name__ == "__main__":
    main()
