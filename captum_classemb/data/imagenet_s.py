"""ImageNet-S (Gao et al. 2022), in the layout of its public release."""

from __future__ import annotations

import csv
from pathlib import Path

from captum_classemb.data.images import is_image
from captum_classemb.data.labels import Labelling, is_wordnet_id
from captum_classemb.data.records import Record, check_records, problems_to_error
from captum_classemb.errors import DataError

_IGNORED = 1000
# What the list of the release counts.
_IMAGENET = 1000
_SELECTION = "validation_stim_info.csv"


def _home(root: Path) -> Path | None:
    """The folder that holds ``validation`` and ``validation-segmentation``."""
    for folder in (root, *sorted(root.glob("ImageNetS*"), reverse=True)):
        if (folder / "validation-segmentation").is_dir():
            return folder
    return None


def is_imagenet_s(root: Path) -> bool:
    """Whether a folder, or one ``ImageNetS…`` in it, has a ``validation-segmentation``."""
    return _home(root) is not None


def _categories(home: Path) -> list[str]:
    size = home.name.removeprefix("ImageNetS")
    names = [f"ImageNetS_categories_im{size}.txt", "ImageNetS_categories_im*.txt"]
    places = [home, home / "data/categories", home.parent, home.parent / "data/categories"]
    for name in names:
        for place in places:
            for path in sorted(place.glob(name)):
                # A class's id in the masks is its place, from 1, among the sorted names.
                return sorted(path.read_text(encoding="utf-8").split())
    raise DataError(
        f"{home} has no category list: put {names[0]} of the ImageNet-S release into it or into "
        "data/categories beside it."
    )


def _selected(home: Path) -> dict[tuple[str, str], int | None]:
    """(class, stem) of every image that belongs to the set, with its label where a list gives it.

    An image whose class has no row in ``validation_stim_info.csv`` is not part of the set: the
    release keeps images of merged classes whose label is not certain.
    """
    path = home / _SELECTION
    if path.is_file():
        try:
            rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as a table: {error}.") from error
        wanted = {"imagenet_id", "index", "img_name"}
        if not rows or not wanted <= rows[0].keys():
            raise DataError(
                f"{path} has to have rows with the columns {', '.join(sorted(wanted))}."
            )
        try:
            return {
                (row["imagenet_id"], Path(row["img_name"]).stem): int(row["index"]) for row in rows
            }
        except (TypeError, ValueError) as error:
            raise DataError(f"{path} has a row without a whole number as index.") from error
    found: dict[tuple[str, str], int | None] = {}
    for folder in sorted((home / "validation").glob("*")):
        if folder.is_dir() and is_wordnet_id(folder.name):
            for image in folder.iterdir():
                if is_image(image):
                    found[folder.name, image.stem] = None
    return found


def read_imagenet_s(root: Path, labelling: Labelling) -> list[Record]:
    """The validation images of ImageNet-S with their masks, sorted by class and file name.

    Mask pixels hold the class id as R + 256·G; 1000 is ignored, and every id but the one of the
    image's own class is context. Where ``validation_stim_info.csv`` lies beside the images, it
    decides what belongs to the set.

    Args:
        root: the folder ``ImageNetS919`` (or 300, 50), or the one it lies in.
        labelling: what the model's outputs are.

    Raises:
        DataError: that lists what is missing or does not fit, with the number of all problems.
    """
    home = _home(root)
    if home is None:
        raise DataError(f"{root} is no ImageNet-S: it has no folder validation-segmentation.")
    mask_values = {name: place for place, name in enumerate(_categories(home), start=1)}
    selected = _selected(home)
    labels = {name: place for place, name in enumerate(labelling.wordnet_ids)}
    files = {
        (folder.name, image.stem): image
        for folder in (home / "validation").glob("*")
        if folder.is_dir()
        for image in folder.iterdir()
        if is_image(image)
    }
    problems = [
        f"class {name} is not in the category list"
        for name, _ in selected
        if name not in mask_values
    ]
    records = []
    for (name, stem), stated in sorted(selected.items()):
        label = labels.get(name, stated)
        if label is None:
            problems.append(f"class {name} has no output in a model of {labelling.count} classes")
            continue
        if problem := labelling.check(label, f"{name}/{stem}"):
            problems.append(problem)
            continue
        if stated is not None and len(labels) == _IMAGENET and stated != label:
            problems.append(f"{_SELECTION} gives {stem} the label {stated}, and {name} is {label}")
        records.append(
            Record(
                name=f"{name}/{stem}",
                image=files.get((name, stem), home / "validation" / name / f"{stem}.JPEG"),
                label=label,
                mask=home / "validation-segmentation" / name / f"{stem}.png",
                mask_value=mask_values.get(name),
                ignored_value=_IGNORED,
            )
        )
    if problems:
        raise problems_to_error(list(dict.fromkeys(problems)), home)
    check_records(records, home)
    return records
