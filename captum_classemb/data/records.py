"""A dataset is a list of records; a layout is a function that makes the list from a folder."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from captum_classemb.data.images import (
    IMAGE_SUFFIXES,
    Source,
    exists,
    read_photograph,
    stored_size,
    turn,
)
from captum_classemb.data.labels import FolderLabels, Labelling
from captum_classemb.data.preprocess import Box, Preprocess, boxes_to_mask
from captum_classemb.data.sample import CONTEXT, IGNORED, OBJECT, Sample
from captum_classemb.errors import DataError

_NAMED = 5


@dataclass(frozen=True)
class Record:
    """Where one image lies and what is known of it.

    Attributes:
        name: what the image is called in its dataset.
        image: its file.
        label: index of its class among the model's outputs, or `UNLABELLED`.
        mask: file of its mask, if it has one.
        mask_value: the object's value in the mask; None if every value but 0 is the object.
        ignored_value: the value of pixels that belong to nothing for sure.
        boxes: of the object, in pixels, where there is no mask.
        upright: whether boxes and mask are in the frame of the upright image, not in that of the
            stored one.
        condition: what was done to the image; empty for an image as it is.
    """

    name: str
    image: Path
    label: int
    mask: Path | None = None
    mask_value: int | None = None
    ignored_value: int | None = None
    boxes: tuple[Box, ...] | None = None
    upright: bool = False
    condition: str = ""


def problems_to_error(problems: Sequence[str], root: Path) -> DataError:
    """One sentence that names the first few problems and counts all of them."""
    shown = "; ".join(problems[:_NAMED])
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    noun = "problem" if len(problems) == 1 else "problems"
    return DataError(f"{root} has {len(problems)} {noun}: {shown}{more}.")


def check_records(records: Sequence[Record], root: Path) -> None:
    """Look for every file, and whether masks and boxes fit their images, before anything runs.

    Raises:
        DataError: that names the first few files and the number of all that are missing,
            unreadable or of the wrong size; or if there is no image at all.
    """
    if not records:
        raise DataError(f"{root} holds no image (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    problems = [problem for problem in map(_problem, records) if problem]
    if problems:
        raise problems_to_error(problems, root)


def _problem(record: Record) -> str | None:
    """What is wrong with the files of a record; an image alone may be found wrong when read."""
    if not exists(record.image):
        return f"image {record.image} is missing"
    if record.mask is None and record.boxes is None:
        return None
    if record.mask is not None and not exists(record.mask):
        return f"mask {record.mask} is missing"
    try:
        size, orientation = stored_size(record.image)
        if record.upright and orientation > 4:
            size = (size[1], size[0])
        if record.mask is not None and (found := stored_size(record.mask)[0]) != size:
            return f"mask {record.mask} is {found[0]}×{found[1]} and its image {size[0]}×{size[1]}"
    except DataError as error:
        return str(error).rstrip(".")
    for x0, y0, x1, y1 in record.boxes or ():
        # A pixel for whoever counts from 1.
        if min(x0, y0) < -1 or x1 > size[0] + 1 or y1 > size[1] + 1:
            return (
                f"the box [{x0:g}, {y0:g}, {x1:g}, {y1:g}] of {record.name} leaves its image of "
                f'{size[0]}×{size[1]} (if it is in the frame of the turned image, say "frame": '
                '"upright")'
            )
    return None


def _read_mask(record: Record, path: Path, orientation: int) -> tuple[torch.Tensor, Source]:
    """The mask in the frame of the upright image, uint8 H×W, and what it was decoded from."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            stored = opened if record.upright else turn(opened, orientation)
            if stored.mode in ("P", "L", "1", "I", "I;16"):
                ids = np.array(stored).astype(np.int64)
            else:
                colours = np.array(stored.convert("RGB")).astype(np.int64)
                ids = colours[..., 0] + 256 * colours[..., 1]
        source = Source(len(content), path.stat().st_mtime_ns, hashlib.sha256(content).hexdigest())
    except Exception as error:
        raise DataError(f"The mask {path} is truncated or damaged, or cannot be read.") from error
    inside = ids != 0 if record.mask_value is None else ids == record.mask_value
    mask = np.where(inside, OBJECT, CONTEXT).astype(np.uint8)
    if record.ignored_value is not None:
        mask[ids == record.ignored_value] = IGNORED
    return torch.from_numpy(mask), source


def _size(path: Path) -> int:
    """In bytes; of a file that cannot be looked at, which is refused when it is read, −1."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _turned(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """A box of the stored image, in pixels of the upright one of width and height ``size``."""
    x0, y0, x1, y1 = box
    if orientation > 4:
        x0, y0, x1, y1 = y0, x0, y1, x1
    width, height = size
    # After the transposition, if there is one: are columns, are rows counted from the other end?
    if orientation in (2, 3, 6, 7):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = height - y1, height - y0
    return x0, y0, x1, y1


class RecordDataset(Dataset[Sample]):
    """Images read from files, each with its label and, where there is one, the object's mask.

    Args:
        records: in the order in which the dataset yields them.
        transform: from a stored image to what the model reads.
        layout: what the layout is called.
        folders: which output each class folder stands for, where there are class folders.

    Raises:
        DataError: when an image or a mask cannot be read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: Preprocess,
        layout: str = "records",
        folders: FolderLabels | None = None,
    ) -> None:
        self.records = list(records)
        self.folders = folders
        self.transform = transform
        self.layout = layout

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> list[int]:
        """The label of each image, without reading it."""
        return [record.label for record in self.records]

    @property
    def with_masks(self) -> int:
        """How many images have a mask or boxes."""
        return sum(record.mask is not None or record.boxes is not None for record in self.records)

    def fingerprint(self) -> str:
        """SHA-256 of names, labels, boxes and file sizes, in order: another set has another."""
        digest = hashlib.sha256()
        for record in self.records:
            sizes = [_size(path) for path in (record.image, record.mask) if path]
            digest.update(repr((record.name, record.label, record.boxes, sizes)).encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        photo = read_photograph(record.image)
        mask, boxes, sources = None, record.boxes, [(str(record.image), photo.source)]
        if record.mask is not None:
            mask, source = _read_mask(record, record.mask, photo.orientation)
            sources.append((str(record.mask), source))
        if boxes is not None and not record.upright:
            boxes = tuple(_turned(box, photo.image.size, photo.orientation) for box in boxes)
        try:
            image, mask, cut = self.transform(photo.image, mask, boxes)
        except DataError as error:
            raise DataError(f"The image {record.image} is refused: {error}") from error
        if cut is not None:
            mask = boxes_to_mask(cut, self.transform.size)
        return Sample(image, record.label, mask, record.name, record.condition, tuple(sources))


#: From a folder, and what labels mean, to records.
Reader = Callable[[Path, Labelling], list[Record]]
