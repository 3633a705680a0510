"""Maps of a whole data set: shards of patch sums and one index, on one process or many.

The images are cut into shards whose content depends on the dataset alone. Process r of R makes
shards r, r + R, …; a shard is written whole or not at all, so a run that is killed and resumed
makes anew the shards that are missing, and its files are those of an undisturbed one.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from captum_classemb.atomic_file import write_atomically
from captum_classemb.data import StudyDataset
from captum_classemb.data.images import Source, printable
from captum_classemb.data.marks import MARK
from captum_classemb.data.sample import UNLABELLED
from captum_classemb.errors import DataError, InputError
from captum_classemb.explain.compute import METHODS, PatchMethod
from captum_classemb.explain.saved_maps import MapEntry
from captum_classemb.runs.batches import Batch, batch_plan, chosen_images, load_batches
from captum_classemb.runs.config import weights_digest
from captum_classemb.runs.processes import (
    all_gather,
    barrier,
    get_rank,
    get_world_size,
    init_process_group,
    is_main_process,
    on_main_process,
)
from captum_classemb.runs.settings import (
    RUN,
    describe_data,
    environment,
    open_folder,
    plain,
    write_json,
)
from captum_classemb.runs.sources import FileRead, check_files
from captum_classemb.runs.storage import exclusive
from captum_classemb.vit import ViT

#: A class, or what chooses one for each image.
Target = int | Literal["label", "predicted"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Of the largest score of a map; bfloat16 keeps a part in 256.
_TOLERANCE = 2**-8


@dataclass(frozen=True)
class MapOptions:
    """How maps are made.

    Attributes:
        targets: the classes explained in every image.
        method: a key of `METHODS`.
        dtype: of the scores on disk: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        shard: images in one file.
        batch_size: images in one forward pass.
        limit: take this many images, evenly spaced over the dataset; all if None.
        workers: processes that read images.
        resume: go on with an interrupted run in the same folder.
        verify: read all files again that a run has read before it goes on.
        progress: show a progress bar.
    """

    targets: Sequence[Target] = ("predicted",)
    method: str = "patch-importance"
    dtype: str = "float16"
    shard: int = 1024
    batch_size: int = 32
    limit: int | None = None
    workers: int = 0
    resume: bool = False
    verify: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"The method {self.method} is unknown: give {', '.join(METHODS)}.")
        if self.dtype not in _DTYPES:
            raise InputError(f"Maps cannot be kept as {self.dtype}: give {', '.join(_DTYPES)}.")
        if not self.targets or self.shard < 1:
            raise InputError("Maps need at least one target, and one image in a shard.")


@dataclass(frozen=True)
class MapResult:
    """What was made.

    Attributes:
        output: the folder.
        images: with a map.
        refused: why images were left out that could not be read.
    """

    output: Path
    images: int
    refused: Sequence[str]


def write_maps(
    vit: ViT,
    name: str,
    data: StudyDataset,
    output: str | Path,
    options: MapOptions | None = None,
) -> MapResult:
    """Write the maps of a data set.

    The folder gets ``maps-00000.safetensors``, … (``maps``, n×K×h×w sums of patches, and what the
    images were read from), ``index.csv`` (a line for each image and target) and ``run.json``;
    :class:`~captum_classemb.explain.SavedMaps` reads it.

    Args:
        vit: the adapted model.
        name: what it is called.
        data: the images.
        output: a new or empty folder, or that of an interrupted run with ``options.resume``.
        options: what to make.

    Raises:
        OutputError: when the folder is in use, holds something else, or cannot be written.
        DataError: when no image can be read, or labels are missing that are to be explained.
        InputError: when scores do not fit the type they are to be kept in.
    """
    options = options or MapOptions()
    output = Path(output)
    if "label" in options.targets and any(label == UNLABELLED for label in data.labels):
        raise DataError("the images have no labels that could be explained: give another target.")
    init_process_group()
    shards = batch_plan(chosen_images(len(data), options.limit), options.shard)
    with exclusive(output / f".lock-{get_rank()}"):
        settings = _settings(vit, name, data, options)
        here = environment(vit.device)
        run = on_main_process(lambda: open_folder(output, settings, here, options.resume))
        if not run["complete"]:
            writer = _Writer(vit, data, output, options)
            writer.make(shards)
            found = all_gather(sorted(writer.found))
            barrier()
            run = on_main_process(lambda: _finish(vit, output, run, sorted(found)))
        barrier()
        images = sum(shard["images"] for shard in run["shards"])
        return MapResult(output, images, run["refused"])


def _settings(vit: ViT, name: str, data: StudyDataset, options: MapOptions) -> dict[str, Any]:
    return plain(
        {
            "command": "maps",
            "model": name,
            "weights": weights_digest(vit.model),
            "dtype": str(vit.dtype).removeprefix("torch."),
            "method": options.method,
            "options": dict(METHODS[options.method].options),
            "targets": list(options.targets),
            "kept_as": options.dtype,
            **describe_data(data),
            "limit": options.limit,
            "shard": options.shard,
            "batch_size": options.batch_size,
        }
    )


def _finish(
    vit: ViT, output: Path, run: dict[str, Any], shards: Sequence[tuple[int, int, list[str]]]
) -> dict[str, Any]:
    """Join the parts of the index; a run that is called complete has all its files."""
    if not any(images for _, images, _ in shards):
        why = next((why for _, _, refused in shards for why in refused), "there is none")
        raise DataError(f"no image could be read: {why}")
    head = io.StringIO()
    csv.writer(head, lineterminator="\n").writerow(MapEntry._fields)
    parts = [_part(output, number) for number, _, _ in shards]
    lines = (part.read_bytes() for part in parts if part.exists())
    write_atomically(output / "index.csv", head.getvalue().encode(), *lines)
    run |= {
        "complete": True,
        "patch_size": list(vit.patch_size),
        "refused": [why for _, _, refused in shards for why in refused],
        "shards": [
            {"file": _shard(output, number).name, "images": images}
            for number, images, _ in shards
            if images
        ],
    }
    write_json(output / RUN, run)
    for part in parts:
        part.unlink(missing_ok=True)
    return run


def _shard(output: Path, number: int) -> Path:
    return output / f"maps-{number:05d}.safetensors"


def _part(output: Path, number: int) -> Path:
    """The lines of the index that belong to a shard, until all are there."""
    return output / f".index-{number:05d}.csv"


class _Writer:
    """Makes the shards of one process.

    Attributes:
        found: number of each shard, its images, and why others were refused.
    """

    def __init__(self, vit: ViT, data: StudyDataset, output: Path, options: MapOptions) -> None:
        self.vit, self.data, self.output, self.options = vit, data, output, options
        self.method: PatchMethod = METHODS[options.method].build(vit)
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
        if not self.options.resume or not _part(self.output, number).is_file():
            return None
        path = _shard(self.output, number)
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
        images = batch.images.to(self.vit.dtype)
        given = self._targets(images, batch.labels)
        logits: list[Tensor] = []
        # The method's own forward pass is the only one.
        hook = self.vit.register_forward_hook(lambda _, __, found: logits.append(found))
        try:
            maps = self._maps(images, given)
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"A batch of {len(images)} images does not fit into the memory of the device: "
                "give a smaller --batch-size."
            ) from error
        finally:
            hook.remove()
        return _Mapped(batch, refused, given.cpu(), logits[-1].float().cpu(), maps.cpu())

    def _targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """B×K."""
        columns = []
        for target in self.options.targets:
            if target == "predicted":
                with torch.no_grad():
                    columns.append(self.vit(images).argmax(-1))
            elif target == "label":
                columns.append(labels)
            else:
                columns.append(torch.full_like(labels, int(target)))
        return torch.stack(columns, 1)

    def _maps(self, images: Tensor, targets: Tensor) -> Tensor:
        """B×K×h×w, in the type they are kept in."""
        if all(isinstance(target, int) for target in self.options.targets):
            maps = self.method.attribute_classes(images, targets[0].tolist())
        else:
            each = [
                self.method.attribute_patches(images, column).flatten(1, -3).sum(1)
                for column in targets.unbind(1)
            ]
            maps = torch.stack(each, 1)
        maps = maps.float()
        kept = maps.to(_DTYPES[self.options.dtype])
        error = (kept.float() - maps).abs().amax((-2, -1))
        if not bool((error <= _TOLERANCE * maps.abs().amax((-2, -1))).all()):
            raise InputError(
                f"Scores of {self.options.method} are too large or too small for "
                f"{self.options.dtype}, or not finite: keep them as float32."
            )
        return kept

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
        write_atomically(_part(self.output, number), part)
        # Of several keys, safetensors would write another one first each time.
        about = {MARK: json.dumps({"refused": list(map(printable, refused))})}
        write_atomically(_shard(self.output, number), save(tensors, about))
        self.found.append((number, len(tensors["image"]), refused))


_SOURCES = ("size", "modified", "sha256")


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
    """One batch: targets B×K, logits B×C and maps B×K×h×w, unless no image could be read."""

    batch: Batch
    refused: Sequence[str]
    targets: Tensor | None = None
    logits: Tensor | None = None
    maps: Tensor | None = None

    def rows(self) -> Iterator[MapEntry]:
        """Lines of the index."""
        assert self.targets is not None and self.logits is not None
        scores = self.logits.gather(1, self.targets)
        probabilities = self.logits.softmax(-1).gather(1, self.targets)
        labels, best = self.batch.labels.tolist(), self.logits.argmax(-1).tolist()
        for i, (image, name) in enumerate(zip(self.batch.indices, self.batch.names, strict=True)):
            for k, target in enumerate(self.targets[i].tolist()):
                score, share = (float(f"{float(x[i, k]):.7g}") for x in (scores, probabilities))
                yield MapEntry(image, name, labels[i], target, best[i], score, share)
