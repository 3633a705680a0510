"""Fourier amplitudes and variance of feature maps by depth, on photographs.

    python benchmarks/fourier_variance.py --weights FILE --images FOLDER --output FOLDER

counts the blocks whose attention lowers, and whose MLP raises, high-frequency amplitude and
variance; tells how much of the variance one channel carries, and how large its activations are;
and compares the time of both measurements with that of the bare model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import timm
import torch
from safetensors.torch import load_file
from timing import environment, interleaved
from torch import Tensor
from torchmetrics import Metric

from captum_classemb.data import Preprocess, read_image
from captum_classemb.data.images import find_images
from captum_classemb.dynamics.depth import DepthMetrics, sign_agreement
from captum_classemb.dynamics.fourier import FourierAmplitude
from captum_classemb.dynamics.variance import FeatureMapVariance, channel_variance


def read(files: list[Path], size: int) -> Tensor:
    """Photographs squashed to size×size, scaled to −1..1."""
    config = {"input_size": (3, size, size), "interpolation": "bicubic"}
    preprocess = Preprocess.from_config({**config, "mean": (0.5,) * 3, "std": (0.5,) * 3}, "squash")
    return torch.stack([preprocess.tensor(preprocess.view(read_image(f))) for f in files])


class WithoutLargest(FeatureMapVariance):
    """The variance, each image's channel of the largest variance left out."""

    def update(self, maps: Tensor) -> None:
        kept = channel_variance(maps).argsort(1)[:, :-1]
        super().update(maps.gather(1, kept[..., None, None].expand(-1, -1, *maps.shape[2:])))


class Massive(Metric):
    """Activations beyond 100: in how many cells of an image, and how large the largest is."""

    full_state_update = False
    cells: Tensor
    images: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("cells", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros(()), dist_reduce_fx="max")

    def update(self, maps: Tensor) -> None:
        size = maps.abs().amax(1)
        self.cells += (size > 100).sum()
        self.images += len(maps)
        self.largest = torch.maximum(self.largest, size.max())

    def compute(self) -> Tensor:
        return torch.stack([self.cells / self.images, self.largest])


def throughput(model: torch.nn.Module, images: Tensor, rounds: int = 7) -> float:
    """Images a second with Fourier and variance taken, over those of the bare model."""
    depth = DepthMetrics(
        model, {"fourier": FourierAmplitude, "variance": FeatureMapVariance}, images
    )

    def bare() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(images)
        return logits

    calls = {"bare": bare, "measured": lambda: depth.update(images)}
    return 1 / interleaved(calls, "bare", rounds, images.device)["measured"]["ratio"]


@click.command()
@click.option("--model", "name", default="vit_tiny_patch16_224", show_default=True)
@click.option("--weights", type=click.Path(exists=True, path_type=Path))
@click.option("--images", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--limit", default=400, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(
    name: str, weights: Path | None, images: Path, limit: int, batch_size: int, output: Path
) -> None:
    """Measure a timm model whose inputs are normalised by 0.5 and 0.5."""
    model = timm.create_model(name, pretrained=weights is None).eval()
    if weights is not None:
        model.load_state_dict(load_file(weights))
    size = model.pretrained_cfg["input_size"][-1]
    files = find_images(images)[:limit]
    depth = DepthMetrics(
        model,
        {
            "fourier, paper": lambda: FourierAmplitude("paper"),
            "fourier, corrected": lambda: FourierAmplitude("corrected"),
            "variance, paper": lambda: FeatureMapVariance("paper"),
            "variance, corrected": lambda: FeatureMapVariance("corrected"),
            "without largest": lambda: WithoutLargest("paper"),
            "massive": Massive,
        },
    )
    ratio = throughput(model, read(files[:batch_size], size))
    for i in range(0, len(files), batch_size):
        depth.update(read(files[i : i + batch_size], size))
    massive = depth.compute("massive")
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "model": name,
        "images": len(files),
        "batch_size": batch_size,
        "kinds": [s.kind for s in depth.steps],
        "throughput_ratio": ratio,
        "variance_without_largest_channel": [float(v) for v in depth.compute("without largest")],
        "cells_beyond_100": [float(m[0]) for m in massive],
        "largest_activation": [float(m[1]) for m in massive],
    }
    for variant in ("paper", "corrected"):
        lines = depth.compute(f"fourier, {variant}")
        variances = [float(v) for v in depth.compute(f"variance, {variant}")]
        high = [float(line[-1]) for line in lines]
        result[variant] = {
            "frequency": depth[f"fourier, {variant}"][0].frequencies.tolist(),
            "amplitude": [line.tolist() for line in lines],
            "variance": variances,
            "largest_channel": [float(m.largest_channel()) for m in depth[f"variance, {variant}"]],
            "attention lowers high frequencies": sign_agreement(
                depth.steps, high, "attention", False
            ),
            "mlp raises high frequencies": sign_agreement(depth.steps, high, "mlp", True),
            "attention lowers variance": sign_agreement(depth.steps, variances, "attention", False),
            "mlp raises variance": sign_agreement(depth.steps, variances, "mlp", True),
        }
    output.mkdir(parents=True, exist_ok=True)
    (output / f"fourier_variance_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for variant in ("paper", "corrected"):
        for key, value in result[variant].items():
            if " " in key:
                click.echo(f"{variant:9}  {key}: {value[0]} of {value[1]} blocks")
    click.echo(f"throughput {result['throughput_ratio']:.2f} × the bare model's")


if __name__ == "__main__":
    main()
