"""Datasets that come in two parts: what something is fitted on, and what it is measured on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from captum_classemb.data.labels import FolderLabels, Labelling
from captum_classemb.data.preprocess import Preprocess
from captum_classemb.data.sample import Sample, StudyDataset
from captum_classemb.data.scenes import SCENE_CLASSES, Scenes, Split
from captum_classemb.errors import DataError

_NAMES: dict[str, Split] = {
    "scenes": "test",
    "scenes:train": "train",
    "scenes:val": "val",
    "scenes:test": "test",
}


def is_scenes(root: Path) -> bool:
    """Whether a path is the name of a split of Scenes, and no folder of that name."""
    return str(root) in _NAMES and not root.exists()


def open_scenes(
    root: Path, transform: Preprocess, labelling: Labelling | None = None
) -> SceneSplit:
    """The split that a name stands for; ``scenes`` is its test split.

    Raises:
        DataError: if the name is unknown, or the model has not one output for each digit.
        MissingExtraError: if scikit-learn is not installed.
    """
    if str(root) not in _NAMES:
        raise DataError(f"{root} is no split of the scenes: give {', '.join(_NAMES)}.")
    count = labelling.count if labelling else None
    if count not in (None, len(SCENE_CLASSES)):
        raise DataError(f"the scenes have {len(SCENE_CLASSES)} classes, and the model {count}.")
    return SceneSplit(_NAMES[str(root)], transform)


class SceneSplit(Dataset[Sample]):
    """One split of :class:`Scenes`, with masks, as a study reads it.

    Scenes are in the order of their classes, as images in folders are: evenly spaced ones are then
    of all classes.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        transform: from a scene to what the model reads.
    """

    layout = "scenes"

    def __init__(self, split: Split, transform: Preprocess) -> None:
        self.scenes = Scenes(split)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        labels = self.scenes.labels
        return [labels[self._place(index)] for index in range(len(self))]

    def _place(self, index: int) -> int:
        """Scenes have the classes 0, 1, …, 9, 0, 1, …; their number is a multiple of ten."""
        classes = len(SCENE_CLASSES)
        each = len(self) // classes
        return index % each * classes + index // each

    @property
    def with_masks(self) -> int:
        """Every image has a mask."""
        return len(self)

    def training(self) -> SceneSplit:
        """The train split."""
        return SceneSplit("train", self.transform)

    def fingerprint(self) -> str:
        """SHA-256 of what the scenes are drawn from, and of the first one."""
        first = self.scenes[0]
        digest = hashlib.sha256(first.image.numpy().tobytes())
        digest.update(repr((self.scenes.split, self.scenes.seed, len(self))).encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        sample = self.scenes[self._place(index)]
        pixels = (255 * sample.image).round().to(torch.uint8).permute(1, 2, 0).numpy()
        image, mask, _ = self.transform(Image.fromarray(np.ascontiguousarray(pixels)), sample.mask)
        return Sample(image, sample.label, mask, sample.name)


def _check_same(test: FolderLabels | None, train: FolderLabels | None) -> None:
    if test is None or train is None:
        return
    for folder in test.index.keys() & train.index.keys():
        if test.index[folder] != train.index[folder]:
            raise DataError(
                f"the class folder {folder} is class {test.index[folder]} of the data and class "
                f"{train.index[folder]} of the training data: say with --labels what it is."
            )


class TrainAndTest(Dataset[Sample]):
    """A dataset to measure on, followed by one to fit on.

    Args:
        test: its images come first.
        train: its images come after them.

    Raises:
        DataError: if a class folder of one does not stand for the same class in the other.
    """

    def __init__(self, test: StudyDataset, train: StudyDataset) -> None:
        _check_same(getattr(test, "folders", None), getattr(train, "folders", None))
        self.test, self.train = test, train
        self.layout = test.layout

    def __len__(self) -> int:
        return len(self.test) + len(self.train)

    @property
    def labels(self) -> list[int]:
        """The label of each image, without reading it."""
        return self.test.labels + self.train.labels

    @property
    def with_masks(self) -> int:
        """How many images have a mask or boxes."""
        return self.test.with_masks + self.train.with_masks

    def trains(self, index: int) -> bool:
        """Whether an image belongs to the part to fit on."""
        return index >= len(self.test)

    def fingerprint(self) -> str:
        """SHA-256 of the fingerprints of both parts."""
        both = self.test.fingerprint() + self.train.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        if self.trains(index):
            return self.train[index - len(self.test)]
        return self.test[index]
