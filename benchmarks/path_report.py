"""Removal curves of one-pass and all-path maps, on half of the photographs of a folder or more.

    python benchmarks/path_report.py --data FOLDER --data FOLDER --weights FILE --output FILE
    python benchmarks/path_report.py ... --model clip --weights FILE --texts FILE

A folder holds photographs and ``annotations.json`` (``file`` and ``label``, 0 to 999). Forms are
chosen on the even index (``--half even``) and reported on the odd one, the default. ``--model
clip`` is CLIP ViT-B/16 with text embeddings of a few classes (``text``, ``names`` and, from labels
to classes, ``imagenet_label`` and ``voc_class``); photographs of other labels are left out. Every
batch is kept in the output as it is done, so an interrupted run goes on there; the table is
printed from what is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from captum_classemb import zero_shot
from captum_classemb.attr import METHODS
from captum_classemb.evaluation.areas import area
from captum_classemb.evaluation.bootstrap import paired_difference
from captum_classemb.evaluation.removal_curves import removal_curves
from captum_classemb.vit import ViT, adapt

DEFAULT = ("patch-importance", "all-path-importance", "libra-fullgrad", "chefer", "cp-lrp")
CLIP = "vit_base_patch16_clip_quickgelu_224"
BATCH = 4


def clip(weights: Path, texts: Path) -> tuple[ViT, dict[int, int]]:
    """CLIP's image tower with a class for each text, and the class of each ImageNet label."""
    stored = load_file(weights)
    state = {"head.bias": torch.zeros(512)}
    for name, value in stored.items():
        if name.endswith(".int8"):
            scale = stored[name.replace(".int8", ".scale")].float()
            state[name.removesuffix(".int8")] = value.float() * scale.view(
                -1, *[1] * (value.dim() - 1)
            )
        elif not name.endswith(".scale"):
            state[name] = value.float()
    tower: Any = timm.create_model(CLIP, num_classes=512)
    tower.load_state_dict(state)
    with np.load(texts) as known:
        names = [str(name) for name in known["names"]]
        labels, voc = known["imagenet_label"].tolist(), known["voc_class"].tolist()
        classes = dict(zip(labels, voc, strict=True))
        text = torch.from_numpy(known["text"]).float()
    return zero_shot(tower.eval(), names, features=text, scale=100.0), classes


def vit_tiny(weights: Path) -> tuple[ViT, None]:
    """ViT-Ti/16 of ImageNet-1k."""
    model: Any = timm.create_model("vit_tiny_patch16_224")
    model.load_state_dict(load_file(weights))
    return adapt(model.eval()), None


def photographs(
    folders: list[Path], half: str, classes: dict[int, int] | None, limit: int
) -> list[tuple[Path, int]]:
    """Files and classes of one half, evenly thinned out to a limit."""
    found = []
    for folder in folders:
        entries = json.loads((folder / "annotations.json").read_text())
        for entry in entries[half == "odd" :: 2]:
            label = entry["label"] if classes is None else classes.get(entry["label"], -1)
            if label >= 0:
                found.append((folder / entry["file"], int(label)))
    count = min(limit, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def reader(model: nn.Module) -> Callable[[Path], Tensor]:
    """From a file to the model's pixels: the whole photograph, squashed."""
    config: Any = model.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))

    def read(path: Path) -> Tensor:
        picture = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(picture, np.float32) / 255)
        return (pixels.permute(2, 0, 1) - mean) / std

    return read


def measured(
    vit: ViT, names: tuple[str, ...], images: Tensor, target: Tensor, steps: int
) -> list[dict[str, list[float]]]:
    """For each image and method the areas: negative and positive, accuracy and probability."""
    rows: list[dict[str, list[float]]] = [{} for _ in images]
    patches = int(np.prod(vit.grid((224, 224))))
    for name in names:
        method = METHODS[name].build(vit)
        maps = method.attribute_patches(images, target).flatten(1, -3).sum(1)
        removed, values = removal_curves(vit, images, maps, target, steps=steps)[:2]
        areas = area(removed, values[..., :2].transpose(2, 3), patches, "trapezoid")
        for row, found in zip(rows, areas, strict=True):
            row[name] = found.flatten().tolist()
    return rows


def table(rows: dict[str, dict[str, list[float]]], names: tuple[str, ...], other: str) -> str:
    """Means over the images with paired intervals against one of the methods."""
    each = {n: torch.tensor([row[n] for row in rows.values()]).view(-1, 2, 2) for n in names}
    lines = [
        f"| {len(rows)} photographs | gap | negative | positive | gap − {other} |",
        "|---|---|---|---|---|",
    ]
    for name, areas in each.items():
        gap = areas[:, 0] - areas[:, 1]
        cells = [gap.mean(0), areas[:, 0].mean(0), areas[:, 1].mean(0)]
        written = [" / ".join(f"{float(v):.3f}" for v in cell) for cell in cells]
        ahead = ""
        if name != other:
            theirs = each[other][:, 0] - each[other][:, 1]
            pairs = [paired_difference(gap[:, m], theirs[:, m]) for m in (0, 1)]
            ahead = " / ".join(f"{p.mean:+.3f} [{p.low:+.3f}, {p.high:+.3f}]" for p in pairs)
        lines.append(f"| {name} | {' | '.join(written)} | {ahead} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing in the output, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--model", choices=("vit_tiny", "clip"), default="vit_tiny")
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--half", choices=("even", "odd"), default="odd")
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    vit, classes = (
        vit_tiny(args.weights) if args.model == "vit_tiny" else clip(args.weights, args.texts)
    )
    names = tuple(args.method or DEFAULT)
    read, files = (
        reader(vit.model),
        photographs(args.data, args.half, classes, args.limit),
    )
    settings = {"model": args.model, "half": args.half, "steps": args.steps, "methods": names}
    kept: dict[str, Any] = {**settings, "images": {}}
    if args.output.is_file():
        kept = json.loads(args.output.read_text())
        if any(kept[key] != (list(v) if key == "methods" else v) for key, v in settings.items()):
            raise SystemExit(f"{args.output} is of other settings: name another --output.")
    left = [(path, label) for path, label in files if path.name not in kept["images"]]
    for start in tqdm(range(0, len(left), BATCH), desc=args.model, mininterval=10):
        some = left[start : start + BATCH]
        images = torch.stack([read(path) for path, _ in some])
        target = torch.tensor([label for _, label in some])
        rows = measured(vit, names, images, target, args.steps)
        kept["images"] |= {path.name: row for (path, _), row in zip(some, rows, strict=True)}
        args.output.write_text(json.dumps(kept, indent=1) + "\n")
    other = "patch-importance" if "patch-importance" in names else names[0]
    print(table(kept["images"], names, other))


if __name__ == "__main__":
    main()
