"""A study with float sums, slow enough to be killed; run as a program with arguments as below."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from captum_classemb.data import Sample
from captum_classemb.errors import OutputError
from captum_classemb.runs import Row, RunOptions, Study, run_study
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.processes import all_reduce

IMAGES = 23


class ToyData:
    layout = "toy"
    with_masks = 0

    def __init__(self, images: int = IMAGES) -> None:
        self.images = images

    @property
    def labels(self) -> list[int]:
        return [i % 3 for i in range(self.images)]

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        image = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(index))
        return Sample(image, index % 3, None, str(index))

    def fingerprint(self) -> str:
        return f"toy-{self.images}"


class Sums(Metric):
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, labels: Tensor) -> None:
        self.total.index_add_(0, labels, values.double())
        self.count.index_add_(0, labels, torch.ones_like(labels))

    def compute(self) -> tuple[Tensor, Tensor]:
        return self.total, self.count


class Toy(Study):
    """The mean exponential of pixels; in a second pass, the mean square of what differs from it."""

    name = "toy"

    def __init__(
        self, pause: float = 0.0, log: Path | None = None, scale: float = 1.0, twice: bool = False
    ) -> None:
        self.pause, self.log, self.scale, self.twice = pause, log, scale, twice
        self.metrics = nn.ModuleDict({"sums": Sums(), "means": Sums()})
        self.number = 0

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "twice": self.twice}

    def passes(self, data: Any, images: Any) -> list[Any]:
        return [images, images] if self.twice else [images]

    def notices(self) -> list[str]:
        return ["twice"] if self.twice else []

    def begin_pass(self, number: int) -> None:
        self.number = number
        self.metrics["sums"] = Sums().to(self.metrics["sums"].total.device)
        self.metrics["sums"].persistent(True)

    def end_pass(self, number: int) -> None:
        own, means = self.metrics["sums"], self.metrics["means"]
        means.total = all_reduce(own.total) / all_reduce(own.count)

    def update(self, batch: Batch) -> None:
        time.sleep(self.pause)
        values = batch.images.exp().mean((1, 2, 3)) * self.scale
        if self.number:
            values = (values - self.metrics["means"].total[batch.labels]).square()
        self.metrics["sums"].update(values, batch.labels)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{batch.number}\n")

    def tables(self) -> dict[str, list[Row]]:
        total, count = self.metrics["sums"].compute()
        rows = [
            Row("toy", "none", -1, "", "", "all", "corrected", f"class {k}", float(t / n), int(n))
            for k, (t, n) in enumerate(zip(total, count, strict=True))
        ]
        return {"toy": rows}


if __name__ == "__main__":
    output, pause, log = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    twice, resume = "twice" in sys.argv[4:], "resume" in sys.argv[4:]
    options = RunOptions(batch_size=2, checkpoint_every=4, progress=False, resume=resume)
    for refused in sys.argv[4:]:
        if refused in ("twice", "resume"):
            continue
        try:
            run_study(Toy(), ToyData(), Path(refused), options)
        except OutputError as error:
            with log.open("a") as file:
                file.write(f"{error}\n")
    run_study(Toy(pause, log, twice=twice), ToyData(), output, options)
