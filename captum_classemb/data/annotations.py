"""Images that a list describes: ``annotations.json``."""

from __future__ import annotations

import difflib
import posixpath
from pathlib import Path
from typing import Any, Literal

from captum_classemb.data.labels import Labelling, read_json
from captum_classemb.data.preprocess import Box
from captum_classemb.data.records import Record, check_records, problems_to_error
from captum_classemb.data.sample import UNLABELLED
from captum_classemb.errors import DataError

_ANNOTATIONS = "annotations.json"
_KEYS = ("file", "label", "boxes", "mask", "frame")
_ALIKE = 0.8
# Of a path that systems take.
_LONGEST = 1024


def is_annotated_folder(root: Path) -> bool:
    """Whether a folder has an ``annotations.json``."""
    return (root / _ANNOTATIONS).is_file()


def parse_boxes(value: Any, where: str) -> tuple[Box, ...]:
    """Boxes from JSON: a list of [x0, y0, x1, y1].

    Raises:
        DataError: if it has another form, or a box no area.
    """
    if not isinstance(value, list):
        raise DataError(f"{where} has the boxes {value!r:.60}: give a list of [x0, y0, x1, y1].")
    boxes = []
    for box in value:
        numbers = box if isinstance(box, list) else []
        # Numbers that no image is large enough for are wrong, and may not fit a float.
        sound = all(type(x) in (int, float) and abs(x) < 2**31 for x in numbers)
        if len(numbers) != 4 or not sound or not (box[0] < box[2] and box[1] < box[3]):
            raise DataError(
                f"{where} has the box {box!r:.60}: a box is [x0, y0, x1, y1], x0 < x1, y0 < y1."
            )
        boxes.append((float(box[0]), float(box[1]), float(box[2]), float(box[3])))
    return tuple(boxes)


def read_annotated_folder(root: Path, labelling: Labelling) -> list[Record]:
    """Images listed in ``annotations.json``, in its order.

    The file is a list of objects with ``file`` (relative to the folder), ``label`` (the model's
    output) and, if wanted, either ``boxes`` ([x0, y0, x1, y1] each, in pixels) or ``mask`` (a file
    whose pixels are not 0 on the object). Both are in the frame of the stored image and are turned
    with it; ``"frame": "upright"`` says that they are in that of the turned image.

    Raises:
        DataError: when the list does not have this form, a label is no output of the model, an
            image is listed twice, or files are missing.
    """
    path = root / _ANNOTATIONS
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path} has to be a list of objects with the keys file and label.")
    records: list[Record] = []
    problems: list[str] = []
    for number, entry in enumerate(entries):
        try:
            records.append(_record(root, entry, f"entry {number}", labelling))
        except DataError as error:
            problems.append(str(error).rstrip("."))
    seen: set[str] = set()
    for record in records:
        place = posixpath.normpath(record.name)
        if place in seen:
            problems.append(f"{record.name} is listed twice")
        seen.add(place)
    if problems:
        raise problems_to_error(problems, path)
    check_records(records, root)
    return records


def _record(root: Path, entry: dict[str, Any], where: str, labelling: Labelling) -> Record:
    for key in entry.keys() - set(_KEYS):
        near = difflib.get_close_matches(key.casefold(), _KEYS, 1, _ALIKE)
        if near:
            raise DataError(f"{where} has the key {key!r}: did you mean {near[0]!r}?")
    name = entry.get("file")
    if not isinstance(name, str) or not 0 < len(name) < _LONGEST:
        raise DataError(f"{where} has no file, a name relative to the folder")
    label = entry.get("label")
    if label is None and not labelling.needed:
        label = UNLABELLED
    elif label is None:
        raise DataError(f"{name} has no label")
    else:
        problem = labelling.check(label, name)
        if problem:
            raise DataError(problem)
    frame: Literal["stored", "upright"] = entry.get("frame", "stored")
    if frame not in ("stored", "upright"):
        raise DataError(f"{name} has the frame {frame!r}: give 'stored' or 'upright'")
    mask, boxes = entry.get("mask"), entry.get("boxes")
    if mask is not None and (not isinstance(mask, str) or not mask):
        raise DataError(f"{name} has the mask {mask!r:.60}: give the name of a file")
    parsed = None if boxes is None else parse_boxes(boxes, name)
    if mask and parsed:
        raise DataError(f"{name} has both a mask and boxes: give one of them")
    return Record(
        name,
        root / name,
        label,
        mask=root / mask if mask else None,
        boxes=parsed or None,
        upright=frame == "upright",
    )
