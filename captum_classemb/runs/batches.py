"""Batches in an order that depends on nothing but the dataset and the batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_classemb.data import IGNORED, Sample, StudyDataset
from captum_classemb.errors import DataError, InputError
from captum_classemb.runs.sources import FileRead


@dataclass(frozen=True)
class Batch:
    """Some images.

    Attributes:
        number: counted over the whole dataset, whichever process takes it.
        indices: places of the images in the dataset, B.
        images: B×3×H×W, on the device.
        labels: int64, B, on the device.
        masks: uint8, B×H×W, on the device (all :data:`IGNORED` for an image without one); None
            if no image of the dataset has one.
        names: of the images.
        conditions: what was done to each image, such as ``fog/3``, or nothing, the empty string;
            none at all where every image is as it is.
        files: what the images were read from, and the images that were refused, which are in none
            of the other fields.
    """

    number: int
    indices: tuple[int, ...]
    images: Tensor
    labels: Tensor
    masks: Tensor | None
    names: tuple[str, ...]
    conditions: tuple[str, ...] = ()
    files: tuple[FileRead, ...] = ()


def chosen_images(total: int, limit: int | None = None) -> list[int]:
    """The images that a run takes: all, or ``limit`` of them, evenly spaced over the dataset.

    Raises:
        InputError: if the limit is not positive.

    Examples:
        >>> chosen_images(9, limit=3)
        [0, 3, 6]
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} has to be at least 1.")
    count = total if limit is None else min(limit, total)
    return [place * total // count for place in range(count)]


def batch_plan(images: Sequence[int], batch_size: int) -> list[list[int]]:
    """Which images each batch holds.

    Raises:
        InputError: if the batch size is not positive.

    Examples:
        >>> batch_plan(range(5), 2)
        [[0, 1], [2, 3], [4]]
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} has to be at least 1.")
    return [list(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]


class _Guarded(Dataset[Any]):
    """Returns errors as values: a worker process would hide them in its traceback."""

    def __init__(self, data: StudyDataset) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Sample | DataError:
        try:
            return self.data[index]
        except DataError as error:
            return error


def _collate(with_masks: bool) -> Any:
    def collate(samples: Sequence[Sample | DataError]) -> Any:
        errors = [str(s) if isinstance(s, DataError) else None for s in samples]
        good = [sample for sample in samples if isinstance(sample, Sample)]
        if not good:
            return errors, None
        images = torch.stack([sample.image for sample in good])
        masks = None
        if with_masks:
            missing = torch.full(images.shape[-2:], IGNORED, dtype=torch.uint8)
            masks = torch.stack(
                [missing if s.mask is None else s.mask.to(torch.uint8) for s in good]
            )
        labels = torch.tensor([sample.label for sample in good])
        names, conditions = zip(*((s.name, s.condition) for s in good), strict=True)
        sources = [s.sources for s in good]
        return errors, (images, labels, masks, names, conditions, sources)

    return collate


def load_batches(
    data: StudyDataset,
    plan: Sequence[tuple[int, list[int]]],
    device: torch.device,
    workers: int = 0,
) -> Iterator[Batch]:
    """Read batches in the order of the plan, without the images that cannot be read.

    Args:
        data: the dataset.
        plan: number and image indices of each batch.
        device: where the tensors go.
        workers: number of processes that read images; 0 reads them in this one.
    """
    loader = DataLoader(
        _Guarded(data),
        batch_sampler=[indices for _, indices in plan],
        num_workers=workers,
        collate_fn=_collate(data.with_masks > 0),
        pin_memory=device.type == "cuda",
        # Study results must not depend on the global generator, nor move it.
        generator=torch.Generator().manual_seed(0),
    )
    for (number, indices), read in zip(plan, loader, strict=True):
        errors, rest = read
        refused = [
            FileRead(index, "", None, error)
            for index, error in zip(indices, errors, strict=True)
            if error is not None
        ]
        kept = tuple(i for i, error in zip(indices, errors, strict=True) if error is None)
        if rest is None:
            empty = torch.empty(0, device=device)
            yield Batch(number, (), empty, empty.long(), None, (), (), tuple(refused))
            continue
        images, labels, masks, names, conditions, sources = rest
        files = [
            FileRead(index, file, source)
            for index, of_image in zip(kept, sources, strict=True)
            for file, source in of_image
        ]
        yield Batch(
            number,
            kept,
            images.to(device, non_blocking=True),
            labels.to(device, non_blocking=True),
            None if masks is None else masks.to(device, non_blocking=True),
            names,
            conditions,
            (*files, *refused),
        )
