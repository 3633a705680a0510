"""Sinks: patch tokens whose norm stands far above the others of their image."""

from __future__ import annotations

from torch import Tensor

__all__ = ["SINK_RATIO", "sinks"]

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
