"""Maps of a whole data set: shards of patch sums and one index, on one process or many.

The images are cut into shards whose content depends on the dataset alone. Process r of R makes
shards r, r + R, …; a shard is written whole or not at all, so a run that is killed and resumed
makes anew the shards that are missing, and its files are those of an undisturbed one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from captum_classemb.atomic_file import write_atomically
from captum_classemb.attr import METHODS, PatchAttribution
from captum_classemb.data import StudyDataset
from captum_classemb.data.sample import UNLABELLED
from captum_classemb.errors import DataError, InputError
from captum_classemb.explain.compute import check_methods
from captum_classemb.explain.saved_maps import MapEntry
from captum_classemb.explain.shards import DTYPES, ShardWriter, part_path, shard_path
from captum_classemb.runs.batches import batch_plan, chosen_images
from captum_classemb.runs.config import weights_digest
from captum_classemb.runs.processes import (
    all_gather,
    barrier,
    get_rank,
    init_process_group,
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
from captum_classemb.runs.storage import exclusive
from captum_classemb.vit import ViT

#: A class, or what chooses one for each image.
Target = int | Literal["label", "predicted"]


@dataclass(frozen=True)
class MapOptions:
    """How maps are made.

    Attributes:
        targets: the classes explained in every image.
        method: a name of :data:`~captum_classemb.attr.METHODS`.
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
        check_methods([self.method])
        if self.dtype not in DTYPES:
            raise InputError(f"Maps cannot be kept as {self.dtype}: give {', '.join(DTYPES)}.")
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
        method = METHODS[options.method].build(vit)
        settings = _settings(vit, name, method, data, options)
        here = environment(vit.device)
        run = on_main_process(lambda: open_folder(output, settings, here, options.resume))
        if not run["complete"]:
            writer = ShardWriter(method, data, output, options)
            writer.make(shards)
            found = all_gather(sorted(writer.found))
            barrier()
            run = on_main_process(lambda: _finish(vit, output, run, sorted(found)))
        barrier()
        images = sum(shard["images"] for shard in run["shards"])
        return MapResult(output, images, run["refused"])


def _settings(
    vit: ViT, name: str, method: PatchAttribution, data: StudyDataset, options: MapOptions
) -> dict[str, Any]:
    return plain(
        {
            "command": "maps",
            "model": name,
            "weights": weights_digest(vit.model),
            "dtype": str(vit.dtype).removeprefix("torch."),
            "method": options.method,
            "options": method.options(),
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
    parts = [part_path(output, number) for number, _, _ in shards]
    lines = (part.read_bytes() for part in parts if part.exists())
    write_atomically(output / "index.csv", head.getvalue().encode(), *lines)
    run |= {
        "complete": True,
        "patch_size": list(vit.patch_size),
        "refused": [why for _, _, refused in shards for why in refused],
        "shards": [
            {"file": shard_path(output, number).name, "images": images}
            for number, images, _ in shards
            if images
        ],
    }
    write_json(output / RUN, run)
    for part in parts:
        part.unlink(missing_ok=True)
    return run
