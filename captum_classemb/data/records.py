"""A dataset is a list of records; a layout is a function that makes the list from a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from captum_classemb.data.sample import CONTEXT, IGNORED, OBJECT, Sample
from captum_classemb.data.transforms import Box, PairedTransform, boxes_to_mask
from captum_classemb.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "Record", "RecordDataset", "check_records", "problems_to_error"]

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
_NAMED = 5


@dataclass(frozen=True)
class Record:
    """Where one image lies and what is known of it.

    Attributes:
        name: what the image is called in its dataset.
        image: its file.
        label: index of its class among the model's outputs.
        mask: file of its mask, if it has one.
        mask_value: the object's value in the mask; None if every value but 0 is the object.
        ignored_value: the value of pixels that belong to nothing for sure.
        boxes: of the object, in pixels of the stored image, where there is no mask.
        condition: what was done to the image; empty for an image as it is.
    """

    name: str
    image: Path
    label: int
    mask: Path | None = None
    mask_value: int | None = None
    ignored_value: int | None = None
    boxes: tuple[Box, ...] | None = None
    condition: str = ""


def problems_to_error(problems: Sequence[str], root: Path) -> DataError:
    """One sentence that names the first few problems and counts all of them."""
    shown = "; ".join(problems[:_NAMED])
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    noun = "problem" if len(problems) == 1 else "problems"
    return DataError(f"{root} has {len(problems)} {noun}: {shown}{more}.")


def check_records(records: Sequence[Record], root: Path) -> None:
    """Look for every file, and compare each mask's size with its image's, before anything runs.

    Raises:
        DataError: that names the first few files and the number of all that are missing,
            unreadable or of the wrong size; or if there is no image at all.
    """
    if not records:
        raise DataError(f"{root} holds no image (looked for {', '.join(IMAGE_SUFFIXES)}).")
    problems = []
    for record in records:
        if not record.image.is_file():
            problems.append(f"image {record.image} is missing")
        elif record.mask is not None and not record.mask.is_file():
            problems.append(f"mask {record.mask} is missing")
        elif record.mask is not None:
            try:
                with Image.open(record.image) as image, Image.open(record.mask) as mask:
                    if image.size != mask.size:
                        problems.append(
                            f"mask {record.mask} is {mask.width}×{mask.height} and its image "
                            f"{image.width}×{image.height}"
                        )
            except (UnidentifiedImageError, OSError):
                problems.append(f"{record.image} or {record.mask} is no readable image")
    if problems:
        raise problems_to_error(problems, root)


def _read_mask(record: Record) -> Tensor:
    assert record.mask is not None
    with Image.open(record.mask) as stored:
        if stored.mode in ("P", "L", "1", "I", "I;16"):
            ids = np.array(stored).astype(np.int64)
        else:
            colours = np.array(stored.convert("RGB")).astype(np.int64)
            ids = colours[..., 0] + 256 * colours[..., 1]
    inside = ids != 0 if record.mask_value is None else ids == record.mask_value
    mask = np.where(inside, OBJECT, CONTEXT).astype(np.uint8)
    if record.ignored_value is not None:
        mask[ids == record.ignored_value] = IGNORED
    return torch.from_numpy(mask)


class RecordDataset(Dataset[Sample]):
    """Images read from files, each with its label and, where there is one, the object's mask.

    Args:
        records: in the order in which the dataset yields them.
        transform: from a stored image to what the model reads.
        layout: what the layout is called.

    Raises:
        DataError: when an image or a mask cannot be read.
    """

    def __init__(
        self, records: Sequence[Record], transform: PairedTransform, layout: str = "records"
    ) -> None:
        self.records = list(records)
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
            sizes = [path.stat().st_size for path in (record.image, record.mask) if path]
            digest.update(repr((record.name, record.label, record.boxes, sizes)).encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        try:
            with Image.open(record.image) as stored:
                stored.load()
                mask = _read_mask(record) if record.mask is not None else None
                image, mask, boxes = self.transform(stored, mask, record.boxes)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise DataError(f"{record.image} cannot be read as an image: {error}.") from error
        if boxes is not None:
            mask = boxes_to_mask(boxes, self.transform.size)
        return Sample(image, record.label, mask, record.name, record.condition)


#: From a folder, and the number of classes of the model, to records.
Reader = Callable[[Path, int | None], list[Record]]
