"""Time the top five Hessian eigenvalues of the demo ViT on 16 scenes.

python benchmarks/hessian_speed.py --output FILE.json
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import click
import torch
from timing import environment

from captum_classemb.data.scenes import Scenes
from captum_classemb.dynamics.hessian import top_eigenvalues
from captum_classemb.models import demo_vit


@click.command()
@click.option("--images", default=16, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(images: int, output: Path) -> None:
    """Measure once; nothing is warm."""
    data = Scenes("train", length=images)
    x = torch.stack([data[i].image for i in range(images)]) * 2 - 1
    model = demo_vit()
    start = perf_counter()
    values = top_eigenvalues(model, x, torch.tensor(data.labels), 5, weight_decay=1e-4)
    result = {
        "environment": environment(torch.device("cpu")),
        "images": images,
        "seconds": round(perf_counter() - start, 2),
        "eigenvalues": values.tolist(),
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(f"{result['seconds']} s")


if __name__ == "__main__":
    main()
