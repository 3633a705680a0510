"""How fast the identifiability study is, whether its memory grows, and what probes cost and know.

    python benchmarks/studies.py compute --model vit_tiny_patch16_224 --output FILE
    python benchmarks/studies.py loader --model vit_tiny_patch16_224 --output FILE
    python benchmarks/studies.py memory --output FILE
    python benchmarks/studies.py probing NAME RESULTS --output FILE
    python benchmarks/studies.py page FILE docs/studies.md

``compute`` and ``loader`` measure against what the machine cannot do without: the bare forward
pass plus the bare products tokens × D × C of all blocks and three sites, in turn; target logits
alone are measured against the bare forward pass. ``compute`` has one batch in memory, ``loader``
reads JPEG photographs (drawn at 500×375 pixels unless a folder is given), once for each call.
``memory`` is the peak of a process that studies 1,000 images against one that studies 10,000, with
the packaged model. ``probing`` takes over what a finished ``study linear-probing`` found. Each adds
its part to FILE; ``page`` writes the tables of the documentation from it.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
from PIL import Image
from timing import environment, interleaved
from torch import Tensor, nn

from captum_classemb.data import Preprocess, Sample, StudyDataset, open_dataset
from captum_classemb.models import demo_vit
from captum_classemb.runs import RunOptions, StudyConfig, read_rows, run_study, select
from captum_classemb.runs.batches import Batch, batch_plan, load_batches
from captum_classemb.studies.identifiability.study import IdentifiabilityStudy
from captum_classemb.studies.token_reader import target_logits
from captum_classemb.vit import adapt, record

SITES = ("resid_post", "attn_out", "mlp_out")
CLASSES = 1000


class Noise:
    """Random images with the left half as object."""

    layout = "noise"

    def __init__(self, images: int, side: int, classes: int) -> None:
        self.images, self.side, self.classes = images, side, classes
        self.with_masks = images

    @property
    def labels(self) -> list[int]:
        return [i % self.classes for i in range(self.images)]

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, self.side, self.side, generator=generator)
        mask = torch.zeros(self.side, self.side, dtype=torch.uint8)
        mask[:, : self.side // 2] = 1
        return Sample(image, index % self.classes, mask, str(index))

    def fingerprint(self) -> str:
        return f"noise-{self.images}"


@contextmanager
def photographs(count: int) -> Iterator[Path]:
    """A folder of JPEG files as large as ImageNet's, with a box each."""
    with tempfile.TemporaryDirectory() as name:
        folder, entries = Path(name), []
        random = np.random.default_rng(0)
        for i in range(count):
            coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            grain = random.normal(0, 6, (375, 500, 3))
            pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
            entries.append({"file": f"{i}.jpg", "label": i, "boxes": [[0, 0, 250, 375]]})
        (folder / "annotations.json").write_text(json.dumps(entries))
        yield folder


class Contest:
    """The study, target logits alone, and the two limits, on whatever batches there are.

    Args:
        name: of a timm model.
        batches: gives the same batches each time it is called.
        device: of the model.
    """

    def __init__(
        self, name: str, batches: Callable[[], Iterator[Batch]], device: torch.device
    ) -> None:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES).eval().to(device)
        self.model: nn.Module = model
        self.batches = batches
        self.vit = adapt(model)
        self.study = IdentifiabilityStudy(StudyConfig(model, name))
        self.study.metrics.to(device)
        first = next(batches())
        embedded: Tensor = record(self.vit, first.images, ["embedding"])["embedding"][0]
        self.tokens = embedded.flatten(0, 1).contiguous()
        self.weight = torch.randn(self.tokens.shape[1], CLASSES, device=device)
        self.room = torch.empty(len(self.tokens), CLASSES, device=device)

    def _each(self, work: Callable[[Batch], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for batch in self.batches():
                    work(batch)

        return run

    def _limit(self, batch: Batch) -> None:
        self.model(batch.images)
        for _ in range(len(SITES) * len(self.vit.blocks)):
            torch.mm(self.tokens, self.weight, out=self.room)

    def _targets(self, batch: Batch) -> None:
        recording = record(self.vit, batch.images, SITES)
        for site in SITES:
            for tokens in recording[site]:
                target_logits(self.vit.readout, tokens, batch.labels)

    def shares(self, rounds: int, device: torch.device) -> dict[str, Any]:
        """Share of each limit, and seconds a call."""
        study = {
            "forward and products": self._each(self._limit),
            "study": self._each(self.study.update),
        }
        targets = {
            "forward": self._each(lambda batch: self.model(batch.images)),
            "targets": self._each(self._targets),
        }
        a = interleaved(study, "forward and products", rounds, device)
        b = interleaved(targets, "forward", rounds, device)
        return {
            "study_share_of_limit": 1 / a["study"]["ratio"],
            "targets_share_of_forward": 1 / b["targets"]["ratio"],
            "timings": {**a, **b},
        }


def in_memory(batch_size: int, device: torch.device) -> Callable[[], Iterator[Batch]]:
    """One batch that is there already."""
    (batch,) = load_batches(Noise(batch_size, 224, CLASSES), [(0, list(range(batch_size)))], device)
    return lambda: iter([batch])


def from_files(
    data: StudyDataset, batch_size: int, device: torch.device
) -> Callable[[], Iterator[Batch]]:
    """Every image of a dataset, read each time."""
    plan = list(enumerate(batch_plan(range(len(data)), batch_size)))
    return lambda: load_batches(data, plan, device)


def peak(images: int) -> float:
    """Peak memory in MiB of a process of its own that studies so many images."""
    command = [sys.executable, __file__, "measure", str(images)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def add(output: Path | None, part: str, key: str, found: dict[str, Any]) -> None:
    """Add to the figures in a file, each with where it was measured."""
    print(json.dumps({part: {key: found}}, indent=2))
    if output is None:
        return
    whole = json.loads(output.read_text()) if output.is_file() else {}
    whole.setdefault(part, {})[key] = found
    output.write_text(json.dumps(whole, indent=2) + "\n")


def probing(folder: Path) -> dict[str, Any]:
    """Accuracy by block, and seconds, of a finished study of probes."""
    run = json.loads((folder / "run.json").read_text())
    rows = read_rows(folder / "linear_probing.csv")
    accuracy = {}
    for name in ("probe", "projection"):
        for site in SITES:
            for tokens in ("cls", "image"):
                chosen = select(
                    rows, metric=f"{name}_accuracy", site=site, tokens=tokens, group="all"
                )
                accuracy[f"{name}/{site}/{tokens}"] = [round(row.value, 4) for row in chosen]
    settings = run["settings"]
    return {
        "model": settings["model"],
        "data": settings["data"],
        "images": run["images"],
        "classes": len(run["classes"]),
        "classes_left_out": len(run["classes_left_out"]),
        "folds": run["folds"],
        "model_accuracy": round(select(rows, metric="accuracy")[0].value, 4),
        "accuracy_by_block": accuracy,
        "seconds_by_stage": run["seconds_by_stage"],
        "device": run["device"],
        "versions": run["versions"],
    }


_OUTPUT = click.option("--output", type=click.Path(path_type=Path), help="JSON file to add to.")
_MODEL = click.option("--model", default="vit_base_patch16_224", show_default=True)
_BATCH = click.option("--batch-size", default=32, show_default=True)
_ROUNDS = click.option("--rounds", default=5, show_default=True)
_DEVICE = click.option("--device", default="cpu", show_default=True)


@click.group()
def main() -> None:
    """Measure one thing at a time."""


@main.command()
@_MODEL
@_BATCH
@_ROUNDS
@_DEVICE
@_OUTPUT
def compute(model: str, batch_size: int, rounds: int, device: str, output: Path | None) -> None:
    """Throughput on a batch in memory."""
    where = torch.device(device)
    found = Contest(model, in_memory(batch_size, where), where).shares(rounds, where)
    found |= {"batch_size": batch_size, "environment": environment(where)}
    add(output, "compute", model, found)


@main.command()
@_MODEL
@_BATCH
@_ROUNDS
@_DEVICE
@click.option("--images", default=64, show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Photographs. Default: drawn.")
@_OUTPUT
def loader(
    model: str,
    batch_size: int,
    rounds: int,
    device: str,
    images: int,
    data: Path | None,
    output: Path | None,
) -> None:
    """Throughput with the images read from files."""
    where = torch.device(device)
    with photographs(images) as drawn:
        files = open_dataset(data or drawn, Preprocess(crop_pct=0.9), classes=CLASSES)
        batches = from_files(files, batch_size, where)
        found = Contest(model, batches, where).shares(rounds, where)
    found |= {"batch_size": batch_size, "images": len(files), "environment": environment(where)}
    add(output, "loader", model, found)


@main.command()
@_OUTPUT
def memory(output: Path | None) -> None:
    """Peak memory of 1,000 and of 10,000 images."""
    found: dict[str, Any] = {f"{count}_images_mib": peak(count) for count in (1_000, 10_000)}
    found["environment"] = environment(torch.device("cpu"))
    add(output, "peak_memory", "demo_vit", found)


@main.command("probing")
@click.argument("name")
@click.argument("results", type=click.Path(path_type=Path))
@_OUTPUT
def take_over(name: str, results: Path, output: Path | None) -> None:
    """What a finished study of probes found."""
    add(output, "linear_probing", name, probing(results))


def probing_table(found: dict[str, Any]) -> str:
    """Accuracy after chosen blocks, probe beside class embedding."""
    lines = ["| data | model | classes | tokens | read by | " + "first block | middle | last |"]
    lines.append("|---" * 8 + "|")
    for name, study in found.items():
        for tokens in ("cls", "image"):
            for reader, words in (("probe", "probe"), ("projection", "class embedding")):
                values = study["accuracy_by_block"][f"{reader}/resid_post/{tokens}"]
                shown = [values[0], values[len(values) // 2 - 1], values[-1]]
                cells = [name, study["model"], study["classes"], tokens, words, *shown]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("")
    for name, study in found.items():
        seconds = study["seconds_by_stage"]
        fit = seconds["sums"] + seconds["solve"]
        lines.append(
            f"- {name}: {study['images']} images; all probes took {fit:.1f} s to fit beside "
            f"{seconds['forward']:.1f} s of forward passes, {seconds['read_probes']:.1f} s to "
            f"read, the class embedding {seconds['read_projection']:.1f} s to read."
        )
    return "\n".join(lines)


def cost_table(found: dict[str, Any]) -> str:
    """Shares of the limits, and peak memory."""
    lines = [
        "| model | images | study: share of the limit | target logits: share of a forward pass |"
    ]
    lines.append("|---" * 4 + "|")
    for part, words in (("compute", "in memory"), ("loader", "JPEG files")):
        for model, figures in found.get(part, {}).items():
            study, targets = (
                figures[key] for key in ("study_share_of_limit", "targets_share_of_forward")
            )
            lines.append(f"| {model} | {words} | {study:.2f} | {targets:.2f} |")
    for model, peaks in found.get("peak_memory", {}).items():
        few, many = peaks["1000_images_mib"], peaks["10000_images_mib"]
        lines += ["", f"Peak memory of {model} over 1,000 images is {few:.0f} MiB, over 10,000 "]
        lines[-1] += f"images {many:.0f} MiB."
    return "\n".join(lines)


@main.command()
@click.argument("figures", type=click.Path(path_type=Path))
@click.argument("page", type=click.Path(path_type=Path))
def page(figures: Path, page: Path) -> None:
    """Write the tables of a page again, between its markers."""
    found = json.loads(figures.read_text())
    text = page.read_text()
    tables = {"probing": probing_table(found["linear_probing"]), "costs": cost_table(found)}
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    page.write_text(text)


@main.command(hidden=True)
@click.argument("images", type=int)
def measure(images: int) -> None:
    """Study so many images and print the peak memory of this process."""
    model = demo_vit()
    with tempfile.TemporaryDirectory() as folder:
        study = IdentifiabilityStudy(StudyConfig(model, "demo_vit"))
        data = Noise(images, 64, adapt(model).num_classes)
        run_study(study, data, Path(folder) / "out", RunOptions(progress=False))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
