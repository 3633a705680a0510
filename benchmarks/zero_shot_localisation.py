"""Where a zero-shot CLIP can read a class: the sites of the last block against boxes of objects.

Run ``python benchmarks/zero_shot_localisation.py FILE TEXT DATA …`` with a state dict of timm's
``vit_base_patch16_clip_quickgelu_224`` (512 classes), an npz file with ``text`` (C×512), ``names``,
``imagenet_label`` and ``voc_class``, and folders with ``annotations.json`` (file, label, boxes in
pixels). Every second image is read; designs were chosen on the others.

Pointing is the share of images whose highest patch has its centre in a box; energy the share of
the positive scores that lies in boxes. Centred maps have the mean over the classes taken off.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_classemb import ClassEmbeddingProjection, zero_shot
from captum_classemb.data import Preprocess
from captum_classemb.data.preprocess import boxes_to_mask
from captum_classemb.models import load_model

MODEL = "vit_base_patch16_clip_quickgelu_224"


def photographs(
    folders: list[Path], classes: dict[int, int], transform: Preprocess
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Every second image of the classes with boxes: pixels, mask and class."""
    known = [
        (folder, entry)
        for folder in folders
        for entry in json.loads((folder / "annotations.json").read_text())
        if entry["label"] in classes and entry["boxes"]
    ]
    for folder, entry in known[1::2]:
        pixels, _, boxes = transform(Image.open(folder / entry["file"]), boxes=entry["boxes"])
        assert boxes is not None
        yield pixels, boxes_to_mask(boxes, transform.size) > 0, classes[entry["label"]]


def scores(maps: Tensor, mask: Tensor) -> tuple[float, float]:
    """Pointing and energy of a map h×w."""
    side = mask.shape[0] // maps.shape[0]
    row, column = divmod(int(maps.argmax()), maps.shape[1])
    hit = mask[row * side + side // 2, column * side + side // 2]
    positive = maps.clamp_min(0).repeat_interleave(side, 0).repeat_interleave(side, 1)
    return float(hit), float((positive * mask).sum() / positive.sum().clamp_min(1e-12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("data", type=Path, nargs="+")
    given = parser.parse_args()
    tower = load_model(MODEL, given.weights)
    with np.load(given.text) as file:
        names = [str(name) for name in file["names"]]
        labels = zip(file["imagenet_label"].tolist(), file["voc_class"].tolist(), strict=True)
        classes = {label: int(name) for label, name in labels}
        model = zero_shot(tower, names, features=file["text"], scale=100.0)
    found: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for pixels, mask, target in photographs(
        given.data, classes, Preprocess.of_model(tower, "squash")
    ):
        for site in ("resid_post", "value"):
            method = ClassEmbeddingProjection(model, site=site)
            every = method.attribute_classes(pixels[None])[0]
            for kind, maps in (("as it is", every), ("centred", every - every.mean(0))):
                found[site, kind].append(scores(maps[target], mask))
        found["boxes", ""].append((0.0, float(mask.float().mean())))
    with torch.no_grad():
        for (site, kind), values in found.items():
            pointing, energy = np.mean(values, 0)
            print(
                f"{site:<12}{kind:<10}{len(values):>5} pointing {pointing:.2f} energy {energy:.2f}"
            )


if __name__ == "__main__":
    main()
