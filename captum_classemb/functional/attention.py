"""Attention weights for the query rows asked for, and what they carry along a direction."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.functional.precision import upcast

__all__ = ["attention_weights", "carried", "chunks", "values_along"]

_AT_ONCE = 1 << 22
"""Numbers that are worked on at once on a CPU: more would leave its caches."""


def attention_weights(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale · query·keyᵀ + bias) for the query rows given.

    Args:
        query: B×H×Q×d.
        key: B×H×N×d.
        scale: factor of the dot products.
        bias: added before the softmax, broadcastable to B×H×Q×N.

    Returns:
        B×H×Q×N, float32 or wider.
    """
    # Under autocast the product would be rounded to half precision again.
    with torch.autocast(query.device.type, enabled=False):
        query, key = upcast(query) * scale, upcast(key)
        scores = _one_row(query, key) if query.shape[2] == 1 else query @ key.mT
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(-1)


def _one_row(query: Tensor, key: Tensor) -> Tensor:
    """query·keyᵀ for one row: heads side by side in one product, so that no key is copied."""
    batch, heads, count, width = key.shape
    beside = key.transpose(1, 2)
    if beside.stride(2) != width * beside.stride(3) or batch * heads == 1:
        return query @ key.mT
    blocks = torch.eye(heads, dtype=query.dtype, device=query.device)
    spread = (query[:, :, 0, :, None] * blocks[:, None]).flatten(1, 2)
    return (beside.flatten(2) @ spread).transpose(1, 2)[:, :, None]


def values_along(values: Tensor, directions: Tensor) -> Tensor:
    """v_j^k · z_q^k: each value vector along the directions of its head.

    Args:
        values: v, …×H×N×d.
        directions: z, …×Q×K×(H·d), K directions for each of Q query rows.

    Returns:
        …×H×Q×K×N.
    """
    heads, width = values.shape[-3], values.shape[-1]
    *lead, rows, count, _ = directions.shape
    z = directions.reshape(*lead, rows * count, heads, width).transpose(-2, -3)
    along: Tensor = z @ values.to(z.dtype).mT
    by_row: Tensor = along.unflatten(-2, (rows, count))
    return by_row


def carried(attention: Tensor, values: Tensor, directions: Tensor) -> Tensor:
    """Σ_q A[q, j] · v_j^k · z_q^k: what attention brings from each source token along z.

    Args:
        attention: A, …×H×Q×N.
        values: v, …×H×N×d.
        directions: z = W_Oᵀu, …×Q×K×(H·d).

    Returns:
        …×H×K×N.
    """
    return (attention[..., None, :] * values_along(values, directions)).sum(-3)


def chunks(values: Tensor) -> list[slice]:
    """The blocks (L×…) worked on at once: all on an accelerator, few megabytes on a CPU."""
    count = len(values)
    some = count
    if values.device.type == "cpu":
        some = max(1, min(count, _AT_ONCE // max(1, values[0].numel())))
    return [slice(start, min(start + some, count)) for start in range(0, count, some)]
