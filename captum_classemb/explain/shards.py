"""Shards of maps: what one process makes of its part of a data set."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from captum_classemb.atomic_file import write_atomically
from captum_classemb.attr import PatchAttribution
from captum_classemb.attr.together import SharedPass
from captum_classemb.data import StudyDataset
from captum_classemb.data.images import Source, printable
from captum_classemb.data.marks import MARK
from captum_classemb.errors import InputError
from captum_classemb.explain.saved_maps import MapEntry
from captum_classemb.runs.batches import Batch, batch_plan, load_batches
from captum_classemb.runs.processes import get_rank, get_world_size, is_main_process
from captum_classemb.runs.sources import FileRead, check_files

if TYPE_CHECKING:
    from captum_classemb.explain.maps import MapOptions

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Of the largest score of a map; bfloat16 keeps a part in 256.
_TOLERANCE = 2**-8
_SOURCES = ("size", "modified", "sha256")


def shard_path(output: Path, number: int) -> Path:
    """The file of a shard."""
    return output / f"maps-{number:05d}.safetensors"


def part_path(output: Path, number: int) -> Path:
    """The lines of the index that belong to a shard, until all are there."""
    return output / f".index-{number:05d}.csv"


class ShardWriter:
    """Makes the shards of one process.

    Attributes:
        found: number of each shard, its images, and why others were refused.
    """

    def __init__(
        self, method: PatchAttribution, data: StudyDataset, output: Path, options: MapOptions
    ) -> None:
        self.vit, self.method, self.data = method.vit, method, data
        self.output, self.options = output, options
        self.found: list[tuple[int, int, list[str]]] = []

    def make(self, shards: Sequence[Sequence[int]]) -> None:
        """Make those of these shards that are this process's and not there yet."""
        mine = list(enumerate(shards))[get_rank() :: get_world_size()]
        known = {number: self._known(number) for number, _ in mine}
        self.found = [done for done in known.values() if done is not None]
        missing = [(number, list(images)) for number, images in mine if known[number] is None]
        plan = [
            (number, batch)
            for number, images in missing
            for batch in batch_plan(images, self.options.batch_size)
        ]
        bar = tqdm(
            total=sum(len(images) for _, images in mine),
            initial=sum(len(images) for number, images in mine if known[number] is not None),
            unit="image",
            # None: shown on terminals alone.
            disable=None if self.options.progress and is_main_process() else True,
        )
        batches = load_batches(self.data, plan, self.vit.device, self.options.workers)
        done: list[_Mapped] = []
        with bar:
            for place, batch in enumerate(batches):
                done.append(self._map(batch))
                bar.update(len(plan[place][1]))
                if place + 1 == len(plan) or plan[place + 1][0] != batch.number:
                    self._write(batch.number, done)
                    done = []

    def _known(self, number: int) -> tuple[int, int, list[str]] | None:
        """What a shard holds that is there already; None if it has to be made."""
        if not self.options.resume or not part_path(self.output, number).is_file():
            return None
        path = shard_path(self.output, number)
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("image", *_SOURCES)}
        except (OSError, SafetensorError):
            return None
        if MARK not in about:
            return None
        records = getattr(self.data, "records", None)
        if records is not None:
            check_files(
                (
                    FileRead(image, str(records[image].image), Source(size, modified, sha256))
                    for image, size, modified, sha256 in _sources(tensors)
                ),
                self.options.verify,
            )
        return number, len(tensors["image"]), json.loads(about[MARK])["refused"]

    def _map(self, batch: Batch) -> _Mapped:
        refused = [read.refused for read in batch.files if read.refused]
        if self.options.progress:
            for why in refused:
                tqdm.write(f"Error: {why}", file=sys.stderr)
        if not batch.indices:
            return _Mapped(batch, refused)
        try:
            shared = SharedPass(self.vit, [self.method], batch.images)
            logits = shared.done.logits
            targets = self._targets(logits, batch.labels)
            maps = shared.maps(self.method, targets)
            kept = maps.to(DTYPES[self.options.dtype])
            off = (kept.to(maps.dtype) - maps).abs().amax((-2, -1))
            fits = (off <= _TOLERANCE * maps.abs().amax((-2, -1))).all()
            shared.finish()
            targets = targets.expand(len(logits), -1)
            shares = logits.softmax(-1)
            numbers = [x.gather(1, targets).double() for x in (logits, shares)]
            lines = torch.stack([targets.double(), *numbers]).cpu()
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"A batch of {len(batch.images)} images does not fit into the memory of the "
                "device: give a smaller --batch-size."
            ) from error
        if not bool(fits):
            raise InputError(
                f"Scores of {self.options.method} are too large or too small for "
                f"{self.options.dtype}, or not finite: keep them as float32."
            )
        best = logits.argmax(-1).tolist()
        return _Mapped(batch, refused, best, lines, kept.cpu().contiguous())

    def _targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The classes explained: K, or B×K where images have their own."""
        chosen = self.options.targets
        if all(isinstance(target, int) for target in chosen):
            return torch.tensor(chosen, device=logits.device)
        of_images = {"predicted": logits.argmax(-1), "label": labels}
        return torch.stack(
            [torch.full_like(labels, t) if isinstance(t, int) else of_images[t] for t in chosen], 1
        )

    def _write(self, number: int, done: Sequence[_Mapped]) -> None:
        refused = [why for mapped in done for why in mapped.refused]
        whole = [mapped for mapped in done if mapped.maps is not None]
        tensors = _of_sources(read for mapped in whole for read in mapped.batch.files)
        tensors["image"] = torch.tensor(
            [i for mapped in whole for i in mapped.batch.indices], dtype=torch.int64
        )
        if whole:
            tensors["maps"] = torch.cat([m.maps for m in whole if m.maps is not None])
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        for mapped in whole:
            writer.writerows(mapped.rows())
        # The lines first: a shard that is there has its lines.
        part = lines.getvalue().encode(errors="backslashreplace")
        write_atomically(part_path(self.output, number), part)
        # Of several keys, safetensors would write another one first each time.
        about = {MARK: json.dumps({"refused": list(map(printable, refused))})}
        write_atomically(shard_path(self.output, number), save(tensors, about))
        self.found.append((number, len(tensors["image"]), refused))


def _of_sources(reads: Iterable[FileRead]) -> dict[str, Tensor]:
    """What the images were decoded from: n, n and n×32; empty where they are from no files."""
    first = {read.image: read.source for read in reversed(list(reads)) if read.source}
    sources = [first[image] for image in sorted(first)]
    digests = [list(bytes.fromhex(source.sha256)) for source in sources]
    return {
        "size": torch.tensor([source.size for source in sources], dtype=torch.int64),
        "modified": torch.tensor([source.modified for source in sources], dtype=torch.int64),
        "sha256": torch.tensor(digests, dtype=torch.uint8),
    }


def _sources(tensors: dict[str, Tensor]) -> Iterator[tuple[int, int, int, str]]:
    for image, size, modified, digest in zip(
        *(tensors[name].tolist() for name in ("image", *_SOURCES)), strict=False
    ):
        yield image, size, modified, bytes(digest).hex()


@dataclass(frozen=True)
class _Mapped:
    """One batch, unless no image could be read.

    Attributes:
        batch: what was read.
        refused: why images were not.
        best: the model's first choice of each image, B.
        lines: targets, their logits and their probabilities, 3×B×K.
        maps: B×K×h×w.
    """

    batch: Batch
    refused: Sequence[str]
    best: Sequence[int] = ()
    lines: Tensor | None = None
    maps: Tensor | None = None

    def rows(self) -> Iterator[MapEntry]:
        """Lines of the index."""
        assert self.lines is not None
        labels, (targets, scores, shares) = self.batch.labels.tolist(), self.lines.tolist()
        for i, (image, name) in enumerate(zip(self.batch.indices, self.batch.names, strict=True)):
            for target, score, share in zip(targets[i], scores[i], shares[i], strict=True):
                score, share = float(f"{score:.7g}"), float(f"{share:.7g}")
                yield MapEntry(image, name, labels[i], int(target), self.best[i], score, share)
