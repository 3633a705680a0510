"""How much of a bare forward pass's speed `write_maps` keeps, images preloaded.

    python benchmarks/maps_speed.py [--model NAME] [--images N] [--batch-size N]

Prints the medians of five interleaved rounds, and the bytes an image takes beyond its map and path.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from captum_classemb.data import Sample, data_config
from captum_classemb.explain import MapOptions, SavedMaps, write_maps
from captum_classemb.models import load_model
from captum_classemb.vit import adapt

ROUNDS = 5


class Preloaded:
    """Images that lie in memory."""

    layout = "preloaded"
    with_masks = 0

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.labels = [0] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], 0, None, f"{index:06d}")

    def fingerprint(self) -> str:
        """The same for all: nothing is resumed here."""
        return "preloaded"


def seconds(act: Callable[[], object]) -> float:
    """How long something takes."""
    started = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vit = adapt(load_model(given.model, random_init=True, device=device))
    size = data_config(vit.model)["input_size"]
    data = Preloaded(torch.randn(given.images, *size))
    options = MapOptions(targets=[0], batch_size=given.batch_size, progress=False)

    def forward() -> None:
        with torch.no_grad():
            for batch in data.images.split(given.batch_size):
                vit(batch.to(device)).cpu()

    def maps() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_maps(vit, given.model, data, folder, options)

    forward(), maps()
    rounds = [(seconds(forward), seconds(maps)) for _ in range(ROUNDS)]
    bare, whole = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"{given.model} on {device}: {bare / whole:.2f} × the bare forward pass")
    with tempfile.TemporaryDirectory() as folder:
        write_maps(vit, given.model, data, folder, options)
        saved = SavedMaps(folder)
        files = sum(p.stat().st_size for p in Path(folder).iterdir() if p.name != "run.json")
        paths = sum(len(entry.file) for entry in saved.entries)
        beyond = files - 2 * saved[0].numel() * len(saved) - paths
        print(f"{beyond / len(saved):.0f} bytes an image beyond its map and its path")


if __name__ == "__main__":
    main()
