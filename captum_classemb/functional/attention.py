"""What attention to a token brings to a direction of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.functional.precision import wide

__all__ = ["attention_contributions", "attention_gradient", "attention_weights"]


def attention_weights(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale·q·kᵀ + bias) for the query rows given.

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
        scores = (wide(query) * scale) @ wide(key).transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(-1)


def attention_gradient(values: Tensor, direction: Tensor) -> Tensor:
    """∂score/∂A[k, q, j] summed over the query rows q: v_j^k · Σ_q (W_O^kᵀ δ_q).

    Args:
        values: v, B×H×N×d.
        direction: Σ_q W_O^kᵀ δ_q, B×H×d.

    Returns:
        B×H×N.
    """
    return (direction[..., None, :] @ values.to(direction.dtype).transpose(-2, -1))[..., 0, :]


def attention_contributions(weights: Tensor, values: Tensor, directions: Tensor) -> Tensor:
    """Σ_q A[k, q, j] · v_j^k · z_q^k: what each source token brings along the directions z.

    Args:
        weights: A, B×H×Q×N.
        values: v, B×H×N×d.
        directions: z = W_O^kᵀ u_q for each of E directions u, B×E×H×Q×d.

    Returns:
        B×E×H×N.
    """
    values = values.to(directions.dtype).transpose(-2, -1)
    if weights.shape[2] == 1:
        # One product reads the values once for all directions.
        by_head = directions[:, :, :, 0].transpose(1, 2)
        return (weights * (by_head @ values)).transpose(1, 2)
    return torch.stack([(weights * (z @ values)).sum(2) for z in directions.unbind(1)], 1)
