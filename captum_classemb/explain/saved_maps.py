"""Maps of a data set, read lazily from the folder that ``captum-classemb maps`` wrote."""

from __future__ import annotations

import bisect
import csv
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from captum_classemb.errors import DataError
from captum_classemb.functional.grid import spread
from captum_classemb.runs.settings import read_run


class MapEntry(NamedTuple):
    """A line of ``index.csv``: one image and one target.

    Attributes:
        image: its place in the dataset.
        file: what the dataset calls it.
        label: −1 where nobody gave one.
        target: the class explained.
        predicted: the model's first choice.
        score: logit of the target.
        probability: of the target.
    """

    image: int
    file: str
    label: int
    target: int
    predicted: int
    score: float
    probability: float


class SavedMaps:
    """The maps of a data set, K×h×w each, in the order of ``index.csv``.

    Nothing but ``run.json`` is read before a map is asked for.

    Args:
        folder: what ``captum-classemb maps`` wrote.

    Raises:
        OutputError: if the folder holds no run.
        DataError: if the run is not complete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.run = read_run(self.folder)
        if not self.run["complete"] or "shards" not in self.run:
            raise DataError(f"{folder} holds no complete run of maps: finish it with --resume.")
        self._ends = list(accumulate(shard["images"] for shard in self.run["shards"]))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Tensor:
        """The sums of the patches of one image, K×h×w, float32."""
        place = range(len(self))[index]
        shard = bisect.bisect_right(self._ends, place)
        start = self._ends[shard - 1] if shard else 0
        path = self.folder / self.run["shards"][shard]["file"]
        try:
            with safe_open(str(path), framework="pt") as file:
                row: Tensor = file.get_slice("maps")[place - start]
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is missing or damaged: make the maps anew.") from error
        return row.float()

    def pixels(self, index: int) -> Tensor:
        """The map of one image at the size the model reads, K×3×H×W.

        A patch's score is spread evenly over its pixels and channels, as Captum's methods give it,
        so that sums are kept.
        """
        _, height, width = self.run["settings"]["preprocess"]["input_size"]
        patch: list[int] = self.run["patch_size"]
        return spread(self[index], (height, width), 3, (patch[0], patch[1]))

    @cached_property
    def entries(self) -> list[MapEntry]:
        """The lines of ``index.csv``: K for each image."""
        with (self.folder / "index.csv").open(encoding="utf-8", newline="") as lines:
            return [
                MapEntry(
                    int(row["image"]), row["file"], int(row["label"]), int(row["target"]),
                    int(row["predicted"]), float(row["score"]), float(row["probability"]),
                )
                for row in csv.DictReader(lines)
            ]  # fmt: skip
