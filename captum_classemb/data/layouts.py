"""Which layout a folder has, and the dataset in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from captum_classemb.data.annotations import is_annotated_folder, read_annotated_folder
from captum_classemb.data.cifar import Cifar100, is_cifar100
from captum_classemb.data.corrupted import (
    CorruptedCifar,
    is_cifar_c,
    is_imagenet_c,
    open_imagenet_c,
)
from captum_classemb.data.folder import (
    class_folders,
    is_class_folder,
    is_image_folder,
    read_class_folder,
    read_image_folder,
)
from captum_classemb.data.imagenet_s import is_imagenet_s, read_imagenet_s
from captum_classemb.data.labels import Classes, FolderLabels, Labelling
from captum_classemb.data.preprocess import Preprocess
from captum_classemb.data.records import Reader, RecordDataset
from captum_classemb.data.sample import StudyDataset
from captum_classemb.data.splits import is_scenes, open_scenes
from captum_classemb.errors import DataError


class Layout(NamedTuple):
    """One way to lay out a dataset: how to recognise it, how to open it, and in words."""

    recognise: Callable[[Path], bool]
    open: Callable[[Path, Preprocess, Labelling], StudyDataset]
    words: str
    folder: bool = True


def _files(name: str, read: Reader) -> Callable[[Path, Preprocess, Labelling], StudyDataset]:
    def open_files(root: Path, transform: Preprocess, labelling: Labelling) -> StudyDataset:
        return RecordDataset(read(root, labelling), transform, name)

    return open_files


def _open_class_folder(root: Path, transform: Preprocess, labelling: Labelling) -> StudyDataset:
    if not labelling.needed:
        return RecordDataset(read_image_folder(root, labelling), transform, "images")
    folders: FolderLabels = labelling.of_folders(class_folders(root), root)
    return RecordDataset(read_class_folder(root, folders), transform, "folder", folders)


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
    "folder": Layout(is_class_folder, _open_class_folder, "one folder a class"),
    "images": Layout(is_image_folder, _files("images", read_image_folder), "images without labels"),
}

_WITH_CLASS_FOLDERS = ("folder", "imagenet-c")


def recognise_layout(root: str | Path) -> str:
    """The name of the layout that a folder has.

    Raises:
        DataError: when the folder is missing or has none of the known layouts.
    """
    root = Path(root)
    for name, layout in LAYOUTS.items():
        if (root.is_dir() or not layout.folder) and layout.recognise(root):
            return name
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give the folder that holds the dataset.")
    known = "; ".join(f"{name}: {layout.words}" for name, layout in LAYOUTS.items())
    raise DataError(f"{root} has no known layout ({known}).")


def open_dataset(
    root: str | Path,
    transform: Preprocess,
    layout: str | None = None,
    classes: Classes | int | None = None,
    labels: Literal["sorted"] | Mapping[str, int | str] | None = None,
    *,
    labelled: bool = True,
) -> StudyDataset:
    """The dataset in a folder, after every file it needs has been looked for.

    Args:
        root: the folder.
        transform: from a stored image to what the model reads.
        layout: a name in :data:`LAYOUTS`; recognised if None.
        classes: the model's outputs (``captum_classemb.models.class_names``), or their number,
            which decide what labels mean.
        labels: which output each class folder stands for, where their names do not say; or
            ``"sorted"``, to count the folders in sorted order.
        labelled: whether labels are needed.

    Raises:
        DataError: for an unknown layout, for labels that are not sure, and for missing or
            mismatched files, of which the message names the first few and the number of all.
    """
    root = Path(root)
    name = layout or recognise_layout(root)
    if name not in LAYOUTS:
        raise DataError(f"layout {name!r} is unknown: give {', '.join(LAYOUTS)}.")
    if LAYOUTS[name].folder and not root.is_dir():
        raise DataError(f"{root} is no folder: give the folder that holds the dataset.")
    if labels is not None and labelled and name not in _WITH_CLASS_FOLDERS:
        raise DataError(f"{root} has no class folders that --labels could say something of.")
    labelling = Labelling(classes, labels, labelled)
    try:
        return LAYOUTS[name].open(root, transform, labelling)
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror or error}.") from error
