"""Small folders laid out as the corrupted benchmarks are released."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def cifar_c(folder: Path) -> Path:
    """Two corruptions of three images, five severities; each image of one value all over."""
    for start, name in ((100, "fog"), (0, "snow")):
        values = np.arange(start, start + 15, dtype=np.uint8)
        np.save(folder / f"{name}.npy", values[:, None, None, None] * np.ones((4, 4, 3), np.uint8))
    np.save(folder / "labels.npy", np.tile([7, 8, 9], 5))
    return folder


def imagenet_c(folder: Path, kind: str) -> Path:
    for severity in range(1, 6):
        for label, grey in (("n01440764", 50), ("n01443537", 60)):
            place = folder / kind / "fog" / str(severity) / label
            place.mkdir(parents=True)
            # Red on the border: whoever cuts these images again loses it.
            image = Image.new("RGB", (8, 8), (255, 0, 0))
            image.paste((grey + severity,) * 3, (1, 1, 7, 7))
            image.save(place / "a.png")
    return folder
