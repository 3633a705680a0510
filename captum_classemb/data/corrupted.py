"""The released corrupted benchmarks, CIFAR-10-C, CIFAR-100-C and ImageNet-C, from their folders.

Every image says in ``Sample.condition`` which corruption and severity it shows: ``fog/3``.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from captum_classemb.data.folder import class_folders, read_class_folder, read_image_folder
from captum_classemb.data.labels import FolderLabels, Labelling
from captum_classemb.data.preprocess import Preprocess
from captum_classemb.data.records import Record, RecordDataset
from captum_classemb.data.sample import Sample
from captum_classemb.errors import DataError

RELEASED: Final = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The 15 corruptions of Hendrycks & Dietterich (2019), each of 5 severities."""

SEVERITIES: Final = 5

_ANY = Labelling()


def is_cifar_c(root: Path) -> bool:
    """Whether a folder holds ``labels.npy`` and the images of a released corruption."""
    return (root / "labels.npy").is_file() and bool(_files(root))


def _files(root: Path) -> dict[str, Path]:
    files = {corruption: root / f"{corruption}.npy" for corruption in RELEASED}
    return {corruption: file for corruption, file in files.items() if file.is_file()}


class CorruptedCifar(Dataset[Sample]):
    """CIFAR-10-C or CIFAR-100-C as released; it has no masks.

    The folder holds ``labels.npy`` and one ``<corruption>.npy`` of 50,000×32×32×3 bytes each, the
    five severities one after another. The images are read when they are asked for.

    Args:
        root: the unpacked release; corruptions whose file is not there are left out.
        transform: from a stored image to what the model reads.
        labelling: what the model's outputs are.

    Raises:
        DataError: when a file is damaged or does not fit the labels, or the model has too few
            classes.
    """

    layout = "cifar-c"
    with_masks = 0

    def __init__(self, root: Path, transform: Preprocess, labelling: Labelling = _ANY) -> None:
        try:
            self._labels = np.load(root / "labels.npy")
            self._images = {c: np.load(file, mmap_mode="r") for c, file in _files(root).items()}
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{root} holds a damaged .npy file: unpack it again.") from error
        for corruption, images in self._images.items():
            if len(images) != len(self._labels) or len(images) % SEVERITIES:
                raise DataError(
                    f"{root} holds {len(images)} images of {corruption} and {len(self._labels)} "
                    f"labels: both must be the same multiple of {SEVERITIES}."
                )
        if self._labels.dtype.kind not in "iu" or self._labels.ndim != 1 or not self._labels.size:
            raise DataError(f"{root} has labels that are no list of whole numbers.")
        for corruption, images in self._images.items():
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                raise DataError(
                    f"{root} has images of {corruption} that are not height×width×3 bytes."
                )
        count = labelling.count or np.inf
        if self._labels.min() < 0 or self._labels.max() >= count:
            raise DataError(
                f"{root} has labels up to {self._labels.max()}, and the model {count} classes."
            )
        self.transform = transform

    def __len__(self) -> int:
        return len(self._images) * len(self._labels)

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        return [int(label) for label in self._labels] * len(self._images)

    def fingerprint(self) -> str:
        """SHA-256 of the labels and of one image of each corruption and severity."""
        digest = hashlib.sha256(self._labels.tobytes())
        step = len(self._labels) // SEVERITIES
        for corruption, images in self._images.items():
            digest.update(corruption.encode())
            for severity in range(SEVERITIES):
                digest.update(np.ascontiguousarray(images[severity * step]).tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        file, place = divmod(index, len(self._labels))
        corruption = list(self._images)[file]
        severity = place * SEVERITIES // len(self._labels) + 1
        pixels, _, _ = self.transform(Image.fromarray(np.array(self._images[corruption][place])))
        condition = f"{corruption}/{severity}"
        return Sample(pixels, int(self._labels[place]), None, f"{condition}/{place:05d}", condition)


def _places(root: Path) -> dict[str, Path]:
    """Folders of the corruptions, maybe below a kind of corruption (noise, blur, …)."""
    found = {}
    for corruption in RELEASED:
        places = [root / corruption, *sorted(kind / corruption for kind in root.glob("*"))]
        for place in places:
            if any((place / str(severity)).is_dir() for severity in range(1, SEVERITIES + 1)):
                found[corruption] = place
                break
    return found


def is_imagenet_c(root: Path) -> bool:
    """Whether a folder has a released corruption's folders of severities."""
    return root.is_dir() and bool(_places(root))


def open_imagenet_c(
    root: Path, transform: Preprocess, labelling: Labelling = _ANY
) -> RecordDataset:
    """``CORRUPTION/SEVERITY/CLASS/IMAGE``, maybe one folder deeper, as ImageNet-C is released.

    Its images are cut already, so the whole of each is shown. A class folder stands for the same
    output under every corruption.

    Raises:
        DataError: when a severity is missing, or a class does not fit the model.
    """
    folders = {}
    for corruption, place in _places(root).items():
        for severity in range(1, SEVERITIES + 1):
            folder = place / str(severity)
            if not folder.is_dir():
                raise DataError(f"{folder} is missing: unpack {corruption} of ImageNet-C again.")
            folders[f"{corruption}/{severity}"] = folder
    classes: FolderLabels | None = None
    if labelling.needed:
        names = {name for folder in folders.values() for name in class_folders(folder)}
        classes = labelling.of_folders(sorted(names), root)
    records: list[Record] = []
    for condition, folder in folders.items():
        if classes is None:
            found = read_image_folder(folder, labelling)
        else:
            found = read_class_folder(folder, classes)
        records += [
            replace(record, name=f"{condition}/{record.name}", condition=condition)
            for record in found
        ]
    whole = replace(transform, mode="squash", crop_pct=1.0)
    return RecordDataset(records, whole, "imagenet-c", classes)
