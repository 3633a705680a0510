"""What all processes of a run found, put together; also of those that had nothing to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from captum_classemb.runs.processes import all_gather, get_world_size


def add_up(metrics: nn.Module) -> None:
    """Give every process the sums of all, in the order of their ranks.

    Whatever `compute` says afterwards is of all images, and asks no other process. A process that
    got no batch may not even know the size of a sum yet, which torchmetrics' own exchange takes
    for granted.

    Args:
        metrics: a module of torchmetrics' metrics, on the CPU.
    """
    for metric in metrics.modules():
        if not isinstance(metric, Metric):
            continue
        metric.sync_on_compute = False
        metric._to_sync = False
        reductions: dict[str, Any] = {
            name: by for name, by in metric._reductions.items() if by is not None
        }
        if get_world_size() == 1 or not reductions:
            continue
        every = all_gather([{name: getattr(metric, name) for name in reductions}])
        for name, reduction in reductions.items():
            states = [states[name] for states in every]
            default = metric._defaults[name]
            if isinstance(default, list):
                merged: Any = [tensor for state in states for tensor in _listed(state)]
            else:
                known = [state for state in states if state.shape != default.shape] or states
                merged = reduction(torch.stack(known))
            setattr(metric, name, merged)
        metric._update_count = max(1, metric._update_count)
        metric._computed = None


def _listed(state: Tensor | list[Tensor]) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else state
