"""Which layout a folder has, and the dataset in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from captum_classemb.data.cifar import Cifar100, is_cifar100
from captum_classemb.data.corrupted import (
    CorruptedCifar,
    is_cifar_c,
    is_imagenet_c,
    open_imagenet_c,
)
from captum_classemb.data.folder import (
    is_annotated_folder,
    is_class_folder,
    read_annotated_folder,
    read_class_folder,
)
from captum_classemb.data.imagenet_s import is_imagenet_s, read_imagenet_s
from captum_classemb.data.records import Reader, RecordDataset
from captum_classemb.data.sample import StudyDataset
from captum_classemb.data.splits import is_scenes, open_scenes
from captum_classemb.data.transforms import PairedTransform
from captum_classemb.errors import DataError

__all__ = ["LAYOUTS", "Layout", "open_dataset", "recognise_layout"]


class Layout(NamedTuple):
    """One way to lay out a dataset: how to recognise it, how to open it, and in words."""

    recognise: Callable[[Path], bool]
    open: Callable[[Path, PairedTransform, int | None], StudyDataset]
    words: str
    folder: bool = True


def _files(name: str, read: Reader) -> Callable[[Path, PairedTransform, int | None], StudyDataset]:
    def open_files(root: Path, transform: PairedTransform, num_classes: int | None) -> StudyDataset:
        return RecordDataset(read(root, num_classes), transform, name)

    return open_files


#: In the order in which they are tried: the first that recognises a folder takes it.
LAYOUTS: dict[str, Layout] = {
    "scenes": Layout(is_scenes, open_scenes, "the word scenes: digits drawn on demand", False),
    "imagenet-s": Layout(
        is_imagenet_s,
        _files("imagenet-s", read_imagenet_s),
        "ImageNet-S (validation, validation-segmentation, category list)",
    ),
    "annotations": Layout(
        is_annotated_folder,
        _files("annotations", read_annotated_folder),
        "images with an annotations.json",
    ),
    "cifar100": Layout(is_cifar100, Cifar100, "CIFAR-100 (cifar-100-python)"),
    "cifar-c": Layout(
        is_cifar_c, CorruptedCifar, "CIFAR-10-C or CIFAR-100-C (labels.npy, CORRUPTION.npy)"
    ),
    "imagenet-c": Layout(is_imagenet_c, open_imagenet_c, "ImageNet-C (CORRUPTION/SEVERITY/CLASS)"),
    "folder": Layout(is_class_folder, _files("folder", read_class_folder), "one folder a class"),
}


def recognise_layout(root: Path) -> str:
    """The name of the layout that a folder has.

    Raises:
        DataError: when the folder is missing or has none of the known layouts.
    """
    for name, layout in LAYOUTS.items():
        if (root.is_dir() or not layout.folder) and layout.recognise(root):
            return name
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give the folder that holds the dataset.")
    known = "; ".join(f"{name}: {layout.words}" for name, layout in LAYOUTS.items())
    raise DataError(f"{root} has no known layout ({known}).")


def open_dataset(
    root: str | Path,
    transform: PairedTransform,
    layout: str | None = None,
    num_classes: int | None = None,
) -> StudyDataset:
    """The dataset in a folder, after every file it needs has been looked for.

    Args:
        root: the folder.
        transform: from a stored image to what the model reads.
        layout: a name in :data:`LAYOUTS`; recognised if None.
        num_classes: number of outputs of the model, which decides what labels mean.

    Raises:
        DataError: for an unknown layout, and for missing or mismatched files, of which the
            message names the first few and the number of all.
    """
    root = Path(root)
    name = layout or recognise_layout(root)
    if name not in LAYOUTS:
        raise DataError(f"layout {name!r} is unknown: give {', '.join(LAYOUTS)}.")
    if LAYOUTS[name].folder and not root.is_dir():
        raise DataError(f"{root} is no folder: give the folder that holds the dataset.")
    return LAYOUTS[name].open(root, transform, num_classes)
