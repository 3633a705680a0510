"""What verifying a model costs in each call after the first, as a part of one forward pass.

    python benchmarks/check_cost.py --output benchmarks/results/check_cost.json

ViT-B/16 with eight images and ViT-Ti/16 with one, both with random weights. Calls with all checks
and calls without alternate; the cost is the median of their paired differences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timing import environment

from captum_classemb import ClassEmbeddingGradient, MemoryPatchImportance, PatchImportance
from captum_classemb.attr import _inputs
from captum_classemb.vit import checks, forward_pass

#: All that a call does only to verify what it reads.
CHECKS = (
    (_inputs, "verify"),
    (checks.Checks, "equal"),
    (checks.Checks, "finish"),
    (forward_pass._Recorder, "_compare_attention"),
)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cost(name: str, batch: int, rounds: int) -> dict[str, float]:
    """Method → the part of a forward pass that its checks take."""
    model = timm.create_model(name).eval()
    images = torch.randn(batch, 3, *model.patch_embed.img_size)
    off = [mock.patch.object(owner, what, lambda *_: None) for owner, what in CHECKS]

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    methods = [m(model) for m in (ClassEmbeddingGradient, MemoryPatchImportance, PatchImportance)]
    passes: list[float] = []
    differences: dict[str, list[float]] = {type(m).__name__: [] for m in methods}
    for method in methods:
        method.attribute(images, 3)
    for _ in range(rounds):
        passes.append(seconds(forward))
        for method in methods:
            with_checks = seconds(lambda method=method: method.attribute(images, 3))
            for patch in off:
                patch.start()
            without = seconds(lambda method=method: method.attribute(images, 3))
            for patch in off:
                patch.stop()
            differences[type(method).__name__].append(with_checks - without)
    whole = statistics.median(passes)
    return {name: statistics.median(d) / whole for name, d in differences.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = {}
    for name, batch in (("vit_tiny_patch16_224", 1), ("vit_base_patch16_224", 8)):
        rows[f"{name}, batch {batch}"] = cost(name, batch, max(5, args.rounds // batch))
    for model, by_method in rows.items():
        print(model, {name: f"{100 * part:.1f} %" for name, part in by_method.items()})
    if args.output:
        record = {"environment": environment(torch.device("cpu")), "part of a forward pass": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
