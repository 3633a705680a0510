"""Sinks: patch tokens whose norm stands far above the others of their image."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SINK_RATIO", "sinks", "without_sinks"]

#: A sink's norm is above this many times the median of its image's patch tokens.
SINK_RATIO = 3.0


def sinks(norms: Tensor) -> Tensor:
    """Which patch tokens are sinks.

    Trained Vision Transformers turn a few tokens of little content into places that attention rests
    on. They hold hardly anything of their own patch (Darcet et al., ICLR 2024).

    Args:
        norms: of the patch tokens of each image, …×N, prefix tokens left out.

    Returns:
        bool, …×N.

    Examples:
        >>> import torch
        >>> sinks(torch.tensor([1.0, 1.1, 0.9, 3.5]))
        tensor([False, False, False,  True])
    """
    return norms > SINK_RATIO * norms.median(-1, keepdim=True).values


def without_sinks(maps: Tensor, sink: Tensor) -> Tensor:
    """Maps in which no sink scores higher than a quarter of the patches do.

    Args:
        maps: scores of the patches, …×N.
        sink: which patches are sinks, broadcastable to the maps.

    Returns:
        the maps, a sink's score lowered to what ⌊N/4⌋ patches that are no sinks reach, or to 0 if
        that is negative.

    Examples:
        >>> import torch
        >>> maps = torch.tensor([9.0, 4.0, 3.0, 2.0, -1.0, 0.5, 0.1, 0.0])
        >>> without_sinks(maps, maps == 9.0)[:3]
        tensor([3., 4., 3.])
    """
    count = maps.shape[-1]
    others = maps.masked_fill(sink, -torch.inf)
    bound = others.kthvalue(count + 1 - max(count // 4, 1), -1, True).values
    return torch.where(sink, maps.minimum(bound.clamp_min(0.0)), maps)
