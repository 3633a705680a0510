"""What attributions cost, as multiples of one forward pass, side by side in one run.

    python benchmarks/attribution_speed.py --output benchmarks/results/attribution_speed_cpu.json

ViT-B/16 with random weights, batch 8. The class-embedding methods beside Captum's Saliency,
Integrated Gradients and LayerGradCam and eager autograd of all attention maps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from captum.attr import IntegratedGradients, LayerGradCam, Saliency
from timing import environment, interleaved
from torch import Tensor, nn

from captum_classemb import (
    AllPathImportance,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)

FORWARD = "forward (inference_mode)"


def eager_autograd(model: Any, images: Tensor, target: int) -> Callable[[], None]:
    """The published procedure, batched: unfused attention, one autograd call for each block."""
    for block in model.blocks:
        block.attn.fused_attn = False

    def call() -> None:
        attentions: list[Tensor] = []
        outputs: list[Tensor] = []
        hooks = []
        for block in model.blocks:
            hooks.append(
                block.attn.attn_drop.register_forward_hook(
                    lambda _m, _i, out: attentions.append(out)
                )
            )
            hooks.append(
                block.attn.register_forward_hook(lambda _m, _i, out: outputs.append(out[:, 0]))
            )
        model(images)
        for hook in hooks:
            hook.remove()
        for attention, output in zip(attentions, outputs, strict=True):
            logits = model.head(model.norm(output)).softmax(-1)
            loss = logits.log_softmax(-1)[:, target].sum()
            torch.autograd.grad(loss, attention, retain_graph=True)

    return call


def methods(model: Any, eager: Any, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Name → call; the forward pass first."""
    target = 3

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    gradient, memory = ClassEmbeddingGradient(model), MemoryPatchImportance(model)
    projection, importance = ClassEmbeddingProjection(model), PatchImportance(model)
    paths = AllPathImportance(model)
    one_cotangent = AllPathImportance(model, objective="logit")
    gradcam = LayerGradCam(model, model.blocks[-1].norm1)
    return {
        FORWARD: forward,
        "PatchImportance.attribute": lambda: importance.attribute(images, target),
        "AllPathImportance.attribute": lambda: paths.attribute(images, target),
        "AllPathImportance.attribute, logit alone": lambda: one_cotangent.attribute(images, target),
        "ClassEmbeddingProjection.attribute": lambda: projection.attribute(images, target),
        "ClassEmbeddingGradient.attribute": lambda: gradient.attribute(images, target),
        "MemoryPatchImportance.attribute": lambda: memory.attribute(images, target),
        "ClassEmbeddingGradient.attribute_classes (all)": lambda: gradient.attribute_classes(
            images
        ),
        "MemoryPatchImportance.attribute_classes (all)": lambda: memory.attribute_classes(images),
        "PatchImportance.attribute_classes (all)": lambda: importance.attribute_classes(images),
        "eager autograd of all attention maps": eager_autograd(eager, images, target),
        "Captum LayerGradCam": lambda: gradcam.attribute(images, target),
        "Captum Saliency": lambda: Saliency(model).attribute(images, target),
        "Captum IntegratedGradients (5 steps)": lambda: IntegratedGradients(model).attribute(
            images, target=target, n_steps=5, internal_batch_size=len(images)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--own", action="store_true", help="leave out what others would use")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(arguments.model).eval().to(device, dtype)
    eager = timm.create_model(arguments.model).eval().to(device, dtype)
    images = torch.randn(arguments.batch, 3, 224, 224, device=device, dtype=dtype)
    calls = methods(model, eager, images)
    if arguments.own:
        calls = {name: c for name, c in calls.items() if not name.startswith(("Captum", "eager"))}
    timings = interleaved(calls, FORWARD, arguments.rounds, device)
    result = {
        "model": arguments.model,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        **environment(device),
        "methods": timings,
    }
    print("| method | × forward | s |\n|---|---|---|")
    for name, t in timings.items():
        print(f"| {name} | {t['ratio']:.2f} | {t['seconds']:.3f} |")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
