"""The released corrupted benchmarks, from small folders laid out like them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from released import cifar_c, imagenet_c

from captum_classemb.data import Preprocess, open_dataset, recognise_layout
from captum_classemb.errors import DataError

UNIT = Preprocess(size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)


def test_cifar_c(tmp_path: Path) -> None:
    data = open_dataset(cifar_c(tmp_path), UNIT, classes=10)
    assert data.layout == recognise_layout(tmp_path) == "cifar-c"
    assert (len(data), data.with_masks) == (30, 0)
    assert data.labels == [7, 8, 9] * 10
    # In the order of the publication, in which snow comes before fog.
    samples = [data[i] for i in range(30)]
    assert [round(255 * float(s.image[0, 0, 0])) for s in samples] == [*range(15), *range(100, 115)]
    assert [s.label for s in samples] == data.labels
    assert [s.condition for s in samples[9:12]] == ["snow/4"] * 3
    assert samples[15].condition == "fog/1"
    assert len({s.name for s in samples}) == 30


def test_other_images_have_another_fingerprint(tmp_path: Path) -> None:
    before = open_dataset(cifar_c(tmp_path), UNIT).fingerprint()
    assert open_dataset(tmp_path, UNIT).fingerprint() == before
    images = np.load(tmp_path / "fog.npy")
    images[3] += 1
    np.save(tmp_path / "fog.npy", images)
    assert open_dataset(tmp_path, UNIT).fingerprint() != before


def test_bad_cifar_c(tmp_path: Path) -> None:
    cifar_c(tmp_path)
    with pytest.raises(DataError, match="labels up to 9, and the model 5"):
        open_dataset(tmp_path, UNIT, classes=5)
    np.save(tmp_path / "labels.npy", np.zeros(4))
    with pytest.raises(DataError, match="15 images of snow and 4 labels"):
        open_dataset(tmp_path, UNIT)
    (tmp_path / "labels.npy").write_bytes(b"")
    with pytest.raises(DataError, match="damaged .npy"):
        open_dataset(tmp_path, UNIT)


@pytest.mark.parametrize("kind", ["", "weather"])
def test_imagenet_c(tmp_path: Path, kind: str) -> None:
    transform = Preprocess(size=(8, 8), crop_pct=0.5, mean=(0.0,) * 3, std=(1.0,) * 3)
    data = open_dataset(imagenet_c(tmp_path, kind), transform, classes=1000)
    assert data.layout == recognise_layout(tmp_path) == "imagenet-c"
    assert data.labels == [0, 1] * 5
    samples = [data[i] for i in range(len(data))]
    assert [s.condition for s in samples] == [f"fog/{s}" for s in range(1, 6) for _ in range(2)]
    assert round(255 * float(samples[3].image[1, 4, 4])) == 62
    assert float(samples[3].image[0, 0, 0]) == 1.0
    assert samples[3].name == "fog/2/n01443537/a.png"


def test_bad_imagenet_c(tmp_path: Path) -> None:
    place = imagenet_c(tmp_path, "") / "fog"
    (place / "3").rename(place / "three")
    with pytest.raises(DataError, match="fog/3 is missing"):
        open_dataset(tmp_path, UNIT)
