"""What a file of weights says of the model it belongs to: classes, channels, image size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["below_prefix", "shapes"]


def below_prefix(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of the model, where a file holds them below a prefix beside others.

    Args:
        state: all entries of the file.
        wanted: the entries of the model.

    Examples:
        >>> import torch
        >>> weight = torch.zeros(1)
        >>> state = {"student.net.norm.weight": weight, "loss.weight": weight}
        >>> list(below_prefix(state, {"norm.weight": weight}))
        ['norm.weight']
    """
    prefixes = Counter(
        key[: -len(name)]
        for name in wanted
        for key in state
        if key.endswith(name) and key[: -len(name)][-1:] in ("", ".")
    )
    if not prefixes or prefixes[""] == max(prefixes.values()):
        return dict(state)
    best = max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)))
    return {key[len(best) :]: t for key, t in state.items() if key.startswith(best)}


def shapes(model: Any, state: Mapping[str, Tensor]) -> dict[str, int | tuple[int, int]]:
    """The arguments of ``timm.create_model`` that make a model's entries as large as the file's.

    Args:
        model: the model as timm builds it without arguments.
        state: the entries of the file.
    """
    wanted = model.state_dict()
    found: dict[str, int | tuple[int, int]] = {}
    config = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    rows = {len(state[f"{h}.weight"]) for h in heads if f"{h}.weight" in state}
    built = {len(wanted[f"{h}.weight"]) for h in heads if f"{h}.weight" in wanted}
    if built and rows != built and len(rows) < 2:
        found["num_classes"] = next(iter(rows), 0)
    first = f"{config.get('first_conv')}.weight"
    stem = state.get(first)
    if stem is not None and first in wanted and stem.shape[1] != wanted[first].shape[1]:
        found["in_chans"] = stem.shape[1]
    size = _image_size(model, state.get("pos_embed"), wanted.get("pos_embed"))
    return found if size is None else {**found, "img_size": size}


def _image_size(
    model: nn.Module, held: Tensor | None, built: Tensor | None
) -> tuple[int, int] | None:
    """From the grid of learnt positions, 1×N×D or 1×h×w×D."""
    embed: Any = getattr(model, "patch_embed", None)
    grid, patch = getattr(embed, "grid_size", None), getattr(embed, "patch_size", None)
    if held is None or built is None or grid is None or patch is None:
        return None
    if held.shape == built.shape or held.dim() != built.dim():
        return None
    if held.dim() == 4:
        h, w = held.shape[1:3]
    else:
        prefix = built.shape[1] - grid[0] * grid[1]
        h = w = math.isqrt(held.shape[1] - prefix)
        if h * w != held.shape[1] - prefix:
            return None
    return h * patch[0], w * patch[1]
