"""Side-by-side timing: every method in turn, round after round, against one forward pass."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from captum_classemb.versions import versions

__all__ = ["Timing", "environment", "interleaved"]

Timing = dict[str, float]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    reference: str,
    rounds: int,
    device: torch.device,
) -> dict[str, Timing]:
    """Median seconds of each call, and the median over rounds of its ratio to the reference.

    The reference runs before and after each call, so that a slow spell of the machine falls on
    both; a round's ratio is the call's time over the mean of its two neighbours.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    ratios: dict[str, list[float]] = {name: [] for name in calls}

    def clock(call: Callable[[], Any]) -> float:
        start = _now(device)
        call()
        return _now(device) - start

    for call in calls.values():
        call()
    for _ in range(rounds):
        before = clock(calls[reference])
        seconds[reference].append(before)
        ratios[reference].append(1.0)
        for name, call in calls.items():
            if name == reference:
                continue
            taken = clock(call)
            after = clock(calls[reference])
            seconds[name].append(taken)
            ratios[name].append(taken / ((before + after) / 2))
            before = after
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios[name]),
        }
        for name in calls
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What a result file says of where it was made."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }
