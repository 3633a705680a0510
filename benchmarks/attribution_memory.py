"""The peak memory of attributions above that of one forward pass, beside their value vectors.

    python benchmarks/attribution_memory.py --output benchmarks/results/attribution_memory_cpu.json

ViT-B/16 with random weights, batch 8; every allocation of tensors counts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from attribution_speed import FORWARD, methods
from timing import environment

from captum_classemb.evaluation.cost import peak_memory

SLOW = ("Captum", "eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model: Any = timm.create_model(arguments.model).eval().to(device)
    images = torch.randn(arguments.batch, 3, 224, 224, device=device)
    calls = methods(model, timm.create_model(arguments.model).eval().to(device), images)
    calls = {name: call for name, call in calls.items() if not name.startswith(SLOW)}
    for call in calls.values():
        call()
    forward = peak_memory(calls[FORWARD], device)
    above = {name: (peak_memory(call, device) - forward) / 1e6 for name, call in calls.items()}
    tokens = model.pos_embed.shape[1]
    values = len(model.blocks) * len(images) * tokens * model.embed_dim * 4 / 1e6
    print("| method | MB above forward |\n|---|---|")
    for name, megabytes in above.items():
        print(f"| {name} | {megabytes:.0f} |")
    print(f"forward: {forward / 1e6:.0f} MB; value vectors: {values:.0f} MB")
    if arguments.output:
        result = {
            "model": arguments.model,
            "batch": arguments.batch,
            "forward (MB)": forward / 1e6,
            "value vectors (MB)": values,
            **environment(device),
            "above forward (MB)": above,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
