"""Maps of all classes, and the paper's own procedure, against the closed forms.

    python benchmarks/many_classes.py --checkpoint FILE

Peers make the maps of a few classes, one after another, and are scaled to all of them. The
published procedure takes one gradient for each block and token of an image, L×N in all, of the
published objective with respect to that block's attention; it runs on one image.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from compared import OTHERS
from torch import Tensor
from torch.nn import functional as F

from captum_classemb.attr import METHODS, ClassEmbeddingGradient, MemoryPatchImportance
from captum_classemb.attr.patch_importance import PatchImportance
from captum_classemb.models import load_model
from captum_classemb.vit import adapt

SAMPLED = 3
LEFT_OUT = {"raw-attention", "rollout", "linear-probe", "token-occlusion"} | {
    "captum-integrated-gradients", "captum-feature-ablation",
}  # fmt: skip
"""Methods whose map does not depend on the class, that need a file, or many passes for a map."""


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    """The shortest of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def published_maps(model: Any, image: Tensor, target: int) -> Tensor:
    """One autograd call a block and token, as published; the class token's maps, L×H×N."""
    state: list[tuple[Tensor, Tensor]] = []
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        weights: list[Tensor] = []
        handles.append(
            block.attn.attn_drop.register_forward_hook(lambda _, __, a, w=weights: w.append(a))
        )
        handles.append(
            block.attn.register_forward_hook(lambda _, __, o, w=weights: state.append((w[0], o)))
        )
    with torch.enable_grad():
        model(image)
        maps = []
        for attention, output in state:
            p = model.head(model.norm(output)).softmax(-1)[0]
            labels = torch.full((len(p),), target)
            losses = F.cross_entropy(p, labels, reduction="none")
            for token in range(len(p)):
                (g,) = torch.autograd.grad(losses[token], attention, retain_graph=True)
                if token == 0:
                    maps.append(-g[0, :, 0])
    for handle in handles:
        handle.remove()
    for block in model.blocks:
        block.attn.fused_attn = True
    return torch.stack(maps)


@click.command()
@click.option("--model", default="vit_tiny_patch16_224", show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of the model.")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results"))
def main(model: str, checkpoint: Path | None, batch_size: int, output: Path) -> None:
    """Time both comparisons and write ``many_classes.json``."""
    net = load_model(model, checkpoint, random_init=checkpoint is None)
    vit = adapt(net)
    generator = torch.Generator().manual_seed(0)
    size = net.pretrained_cfg["input_size"]
    x = torch.randn(batch_size, *size, generator=generator)
    target = torch.arange(batch_size)

    def forward() -> None:
        with torch.inference_mode():
            vit(x)

    forward()
    once = seconds(forward, 3)
    ours = {}
    for cls in (ClassEmbeddingGradient, MemoryPatchImportance, PatchImportance):
        attribution = cls(vit)
        attribution.attribute_patches(x[:1], 0)
        ours[cls.__name__] = seconds(lambda a=attribution: a.attribute_classes(x), 2)
    peers = {}
    for name, method in METHODS.items():
        if name in LEFT_OUT or not (method.baseline or name in OTHERS):
            continue
        peer = method.build(vit)
        peer.attribute_patches(x, target)
        taken = seconds(lambda p=peer: [p.attribute_patches(x, target + c) for c in range(SAMPLED)])
        peers[name] = taken / SAMPLED * vit.num_classes
    fastest = min(peers, key=lambda name: peers[name])
    gradient = ClassEmbeddingGradient(vit)
    closed = gradient.attribute_patches(x[:1], 7)[0].flatten(-2)
    published: list[Tensor] = []
    procedure = seconds(lambda: published.append(published_maps(net, x[:1], 7)))
    difference = (published[0][..., vit.prefix_tokens :] - closed).abs().max() / closed.abs().max()
    per_image = seconds(lambda: gradient.attribute_patches(x, target), 3) / batch_size
    record = {
        "command": "python " + " ".join([Path(a).name if "/" in a else a for a in sys.argv]),
        "model": model,
        "classes": vit.num_classes,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "forward_seconds": once,
        "ours_seconds": ours,
        "ours_in_forward_passes": {k: v / once for k, v in ours.items()},
        "peers_seconds_scaled_from_classes": SAMPLED,
        "peers_seconds": peers,
        "fastest_peer": fastest,
        "times_faster_than_fastest_peer": {k: peers[fastest] / v for k, v in ours.items()},
        "published_procedure_seconds_an_image": procedure,
        "closed_form_seconds_an_image": per_image,
        "times_faster_than_published_procedure": procedure / per_image,
        "largest_relative_difference_of_maps": float(difference),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "many_classes.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
