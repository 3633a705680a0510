"""Removal curves by taking tokens out, against masking them image by image.

    python benchmarks/removal_speed.py --checkpoint FILE

The other way runs one image and one count at a time, with all tokens, and hides the removed ones
from attention. Both give the same numbers; the table says by how much they differ.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classemb.evaluation.areas import removal_counts
from captum_classemb.evaluation.removal_curves import removal_curves
from captum_classemb.evaluation.removal_order import outcomes, removal_order
from captum_classemb.models import load_model
from captum_classemb.vit import ViT, adapt


@contextmanager
def hidden(visible: Tensor) -> Iterator[None]:
    """Hide tokens (N, False) from all attention."""
    fused = F.scaled_dot_product_attention

    def masked(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return fused(q, k, v, attn_mask=visible[None, None, None].expand(1, 1, q.shape[-2], -1))

    F.scaled_dot_product_attention = masked
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


@torch.no_grad()
def masked_curves(vit: ViT, images: Tensor, scores: Tensor, target: Tensor, steps: int) -> Tensor:
    """The same values, B×2×S×3, one image and one count at a time."""
    order = removal_order(scores)
    patches = order.shape[1]
    values = torch.zeros(len(images), 2, steps + 1, 3)
    for b in range(len(images)):
        for s, count in enumerate(removal_counts(patches, steps + 1).tolist()):
            for o, gone in enumerate((order[b, :count], order[b, patches - count :])):
                visible = torch.ones(vit.prefix_tokens + patches, dtype=torch.bool)
                visible[vit.prefix_tokens + gone] = False
                with hidden(visible):
                    logits = vit(images[b : b + 1])
                values[b, o, s] = outcomes(logits, target[b : b + 1])[0]
    return values


@click.command()
@click.option("--model", default="vit_tiny_patch16_224", show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of the model.")
@click.option("--images", default=16, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results"))
def main(model: str, checkpoint: Path | None, images: int, steps: int, output: Path) -> None:
    """Time both ways on the same images and maps."""
    net = load_model(model, checkpoint, random_init=checkpoint is None)
    vit = adapt(net)
    generator = torch.Generator().manual_seed(0)
    size = net.pretrained_cfg["input_size"]
    x = torch.randn(images, *size, generator=generator)
    scores = torch.rand(images, *vit.grid(size[1:]), generator=generator)
    target = torch.randint(vit.num_classes, (images,), generator=generator)
    removal_curves(vit, x[:2], scores[:2], target[:2], steps=2)
    times, values = [], []
    for way in (
        lambda: removal_curves(vit, x, scores, target, steps=steps).values,
        lambda: masked_curves(vit, x, scores, target, steps),
    ):
        start = time.perf_counter(), time.process_time()
        values.append(way())
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    record = {
        "command": "python " + " ".join([Path(a).name if "/" in a else a for a in sys.argv]),
        "model": model,
        "images": images,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds_removal": times[0][0],
        "seconds_masking_one_by_one": times[1][0],
        "faster": times[1][0] / times[0][0],
        "faster_cpu_time": times[1][1] / times[0][1],
        "largest_difference_of_a_probability": float((values[0] - values[1])[..., 1].abs().max()),
        "largest_difference_of_a_logit": float((values[0] - values[1])[..., 2].abs().max()),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "removal_speed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
