"""How much of a bare forward pass's speed `write_maps` keeps.

    python benchmarks/maps_speed.py [--model NAME] [--images N] [--batch-size N] [--workers N]

Images that lie in memory: maps against the bare forward pass. Then JPEG files, read by workers:
maps against the slower of decoding alone and of those maps. Medians of five interleaved rounds;
and the bytes an image takes beyond its map and its path.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captum_classemb.data import Preprocess, Sample, StudyDataset, open_dataset
from captum_classemb.explain import MapOptions, SavedMaps, write_maps
from captum_classemb.models import load_model
from captum_classemb.runs.batches import batch_plan, load_batches
from captum_classemb.vit import adapt

ROUNDS = 5
# What photographs of ImageNet measure, in the mean.
HEIGHT, WIDTH = 375, 500


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


def write_photographs(folder: Path, count: int) -> None:
    """Smooth noise, which takes about as long to decode as a photograph."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:06d}.jpg", quality=90)


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
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit = adapt(load_model(given.model, random_init=True, device=device))
    preprocess = Preprocess.of_model(vit.model)
    images = torch.randn(given.images, 3, *preprocess.size)

    with tempfile.TemporaryDirectory() as photographs, tempfile.TemporaryDirectory() as results:
        write_photographs(Path(photographs), given.images)
        preloaded = Preloaded(images)
        files = open_dataset(photographs, preprocess, labelled=False)
        folders = (Path(results, str(number)) for number in range(10**6))

        def forward() -> None:
            with torch.no_grad():
                for batch in images.split(given.batch_size):
                    vit(batch.to(device)).cpu()

        def maps(data: StudyDataset, workers: int) -> Path:
            options = MapOptions(
                targets=[0], batch_size=given.batch_size, workers=workers, progress=False
            )
            return write_maps(vit, given.model, data, next(folders), options).output

        def decoding() -> None:
            plan = list(enumerate(batch_plan(range(len(files)), given.batch_size)))
            for _ in load_batches(files, plan, device, given.workers):
                pass

        calls: dict[str, Callable[[], object]] = {
            "forward": forward,
            "maps": lambda: maps(preloaded, 0),
            "decoding": decoding,
            "end to end": lambda: maps(files, given.workers),
        }
        for call in calls.values():
            call()
        rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(ROUNDS)]
        median = {name: statistics.median(r[name] for r in rounds) for name in calls}
        for name, taken in median.items():
            print(f"{name:12}{given.images / taken:8.1f} images a second")
        print(f"{given.model} on {device}, {given.images} images:")
        print(f"{median['forward'] / median['maps']:.2f} × the bare forward pass, preloaded")
        slower = max(median["decoding"], median["maps"])
        print(f"{slower / median['end to end']:.2f} × the slower of decoding and that, from files")
        folder = maps(preloaded, 0)
        saved = SavedMaps(folder)
        size = sum(p.stat().st_size for p in folder.iterdir() if p.name != "run.json")
        paths = sum(len(entry.file) for entry in saved.entries)
        beyond = size - 2 * saved[0].numel() * len(saved) - paths
        print(f"{beyond / len(saved):.0f} bytes an image beyond its map and its path")


if __name__ == "__main__":
    main()
