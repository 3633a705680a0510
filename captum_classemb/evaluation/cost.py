"""What a method costs: passes counted by hooks, time and peak memory against a forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle

from captum_classemb.hooks import after, hooks_removed
from captum_classemb.vit import ViT
from captum_classemb.vit.parts import Call


class Cost(NamedTuple):
    """What one map costs, in forward passes of the same batch.

    Attributes:
        forward_passes: images that went through the blocks, for each that is explained.
        backward_passes: the same of gradients.
        time: median over repeated runs, each beside forward passes just before and after.
        memory: largest number of bytes that lived at once above what was there before.
        milliseconds: the fastest run, an image.
    """

    forward_passes: float
    backward_passes: float
    time: float
    memory: float
    milliseconds: float


def count_passes(vit: ViT, run: Callable[[], Any], images: int, tokens: int) -> tuple[float, float]:
    """Forward and backward passes an image: tokens that went through blocks, over all of them."""
    counts = {"forward": 0.0, "backward": 0.0}

    def went_back(gradient: Tensor) -> None:
        counts["backward"] += gradient.shape[-3] * gradient.shape[-2]

    def went_through(args: Any, kwargs: Any, output: Any) -> None:
        entered = Call(args, kwargs).argument(0)
        counts["forward"] += entered.shape[0] * entered.shape[1]
        result = output[0] if isinstance(output, tuple) else output
        if result.requires_grad:
            result.register_hook(went_back)

    handles: list[RemovableHandle] = []
    with hooks_removed(handles):
        handles += [after(block.module, went_through) for block in vit.blocks]
        run()  # A model with other hooks is verified anew, which is no part of the cost.
        counts.update(forward=0.0, backward=0.0)
        run()
    everything = images * tokens * len(vit.blocks)
    return counts["forward"] / everything, counts["backward"] / everything


def fastest(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The shortest of several runs in seconds."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """The largest number of bytes that lived at once above what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return float(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    living, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        living += event.nbytes()
        peak = max(peak, living)
    return float(peak)


def map_cost(
    vit: ViT,
    maps: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    target: Tensor,
    repeats: int = 9,
) -> Cost:
    """What maps of one batch cost.

    Args:
        vit: an adapted model.
        maps: from images B×3×H×W and targets B to their maps.
        images: B×3×H×W.
        target: B.
        repeats: how often a map that takes less than five seconds is timed.
    """
    device = images.device

    def forward() -> None:
        with torch.inference_mode():
            vit(images)

    def run() -> None:
        maps(images, target)

    forward()
    h, w = vit.grid((images.shape[2], images.shape[3]))
    tokens = h * w + vit.prefix_tokens
    run()  # A model is verified at its first use, and memory grows to its working size.
    passes = count_passes(vit, run, len(images), tokens)
    once = fastest(run, 1, device)
    # A slow method is timed once: its noise averages out within the run.
    ratios, times = [], []
    for _ in range(repeats if once < 5 else 1):
        before = fastest(forward, 2, device)
        taken = fastest(run, 1, device)
        after = fastest(forward, 2, device)
        ratios.append(taken / min(before, after))
        times.append(taken)
    memory = peak_memory(run, device) / peak_memory(forward, device)
    ratio = sorted(ratios)[len(ratios) // 2]
    return Cost(*passes, time=ratio, memory=memory, milliseconds=1e3 * min(times) / len(images))
