"""Images in folders: one folder a class, or just images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captum_classemb.data.annotations import parse_boxes
from captum_classemb.data.images import find_images, is_image
from captum_classemb.data.labels import FolderLabels, Labelling, read_json
from captum_classemb.data.records import Record, check_records, problems_to_error
from captum_classemb.data.sample import UNLABELLED
from captum_classemb.errors import DataError

_BOXES = "boxes.json"
_NOT_CLASSES = ("masks",)


def _class_home(root: Path) -> Path:
    return root / "images" if (root / "images").is_dir() else root


def class_folders(root: Path) -> list[str]:
    """Names of the folders that hold the images of a class each."""
    home = _class_home(root)
    return sorted(
        folder.name
        for folder in home.glob("*")
        if folder.is_dir() and folder.name not in _NOT_CLASSES and not folder.name.startswith(".")
    )


def is_class_folder(root: Path) -> bool:
    """Whether a folder has folders with images in them."""
    home = _class_home(root)
    return any(any(map(is_image, (home / name).iterdir())) for name in class_folders(root))


def read_class_folder(root: Path, folders: FolderLabels) -> list[Record]:
    """``CLASS/IMAGE`` (or ``images/CLASS/IMAGE``), sorted by class and file name.

    A folder ``masks`` beside the classes holds masks as ``masks/CLASS/STEM.png`` (not 0 on the
    object), a file ``boxes.json`` maps ``CLASS/IMAGE`` to its boxes, [x0, y0, x1, y1] each; either
    is optional, but then it has to be there for every image. Both are in the frame of the stored
    image.

    Args:
        root: the folder.
        folders: what each class folder stands for.

    Raises:
        DataError: when files are missing or do not fit, a class folder holds no image, or images
            lie outside of the class folders.
    """
    home = _class_home(root)
    masks = root / "masks" if (root / "masks").is_dir() else None
    boxes = read_json(root / _BOXES) if masks is None and (root / _BOXES).is_file() else None
    if boxes is not None and not isinstance(boxes, dict):
        raise DataError(f"{root / _BOXES} has to map CLASS/IMAGE to a list of boxes.")
    problems = [f"{file.name} lies in no class folder" for file in home.iterdir() if is_image(file)]
    records = []
    for folder in class_folders(root):
        images = sorted(filter(is_image, (home / folder).iterdir()))
        if not images:
            problems.append(f"the class folder {folder} holds no image")
        problems += [
            f"{below.relative_to(home)} lies below a class folder"
            for below in (home / folder).glob("*/**/*")
            if is_image(below)
        ]
        for image in images:
            name = f"{folder}/{image.name}"
            given = None
            if boxes is not None and name not in boxes:
                problems.append(f"{name} has no entry in {_BOXES}")
            elif boxes is not None:
                given = parse_boxes(boxes[name], f"{root / _BOXES}: {name}") or None
            mask = masks / folder / f"{image.stem}.png" if masks is not None else None
            records.append(Record(name, image, folders.index[folder], mask=mask, boxes=given))
    problems += [f"{name} of {_BOXES} is missing" for name in _unused(boxes, records)]
    if problems:
        raise problems_to_error(problems, root)
    check_records(records, root)
    return records


def _unused(boxes: Any, records: list[Record]) -> list[str]:
    return sorted(set(boxes or ()) - {record.name for record in records})


def is_image_folder(root: Path) -> bool:
    """Whether a folder, or one in it, holds images."""
    return any(map(is_image, root.rglob("*")))


def read_image_folder(root: Path, labelling: Labelling) -> list[Record]:
    """Images as they lie, in a folder and its folders, sorted by path; they have no labels.

    Raises:
        DataError: if labels are needed, or there is no image.
    """
    if labelling.needed:
        raise DataError(
            f"{root} has no known layout with labels, and they are needed: put the images of each "
            "class into a folder of its own, or list them in an annotations.json."
        )
    return [
        Record(file.relative_to(root).as_posix(), file, UNLABELLED) for file in find_images(root)
    ]
