"""What attention adds to the logits directly: each source token's entries, later blocks aside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_classemb.attr._heads import source_tangents
from captum_classemb.readout import Chain, ClassEmbedding

__all__ = ["direct_features", "directions_of_heads"]


def directions_of_heads(
    tails: Sequence[Chain], u: Tensor, heads: Sequence[int], hold: bool
) -> list[Tensor]:
    """How the heads of each attention module reach u: z = W_Oᵀu.

    Args:
        tails: the way from A·V to the residual stream, for each module.
        u: E directions of the residual stream at the rows, B×E×Q×D.
        heads: H of each module.
        hold: treat every σ on the way as a constant.

    Returns:
        B×E×H×Q×d for each module.
    """
    found = []
    for tail, count in zip(tails, heads, strict=True):
        if u.shape[2] == 1:
            z = tail.pull(u[:, :, 0], hold)[:, :, None]
        else:
            z = torch.stack([tail.pull(rows, hold) for rows in u.unbind(1)], 1)
        found.append(z.unflatten(-1, (count, -1)).transpose(2, 3))
    return found


def direct_features(
    readout: ClassEmbedding,
    final: Tensor,
    tails: Sequence[Sequence[Chain]],
    attention: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    heads: Sequence[int],
) -> Tensor:
    """What each source token adds to the features that the class embedding reads: B×N×F.

    The class direction is the same for all blocks, so blocks add up before classes are read.

    Args:
        readout: the class embedding; ``readout.head_weight`` reads the features.
        final: the rows read after the last block, B×Q×D.
        tails: the ways from A·V to the residual stream, for each block and module.
        attention: A of the rows, B×H×Q×N for each block and module.
        values: v, B×H×N×d for each block and module.
        heads: the heads that count.
    """
    tangents: Tensor | None = None
    shares = readout.row_weights(final)
    for tail, weights, v in zip(tails, attention, values, strict=True):
        by_part = []
        for share in shares.unbind(1):
            pooled = [torch.einsum("bq,bhqn->bhn", share, a) for a in weights]
            by_part.append(source_tangents(v, tail, heads, pooled, hold=True))
        step = torch.stack(by_part, 1)
        tangents = step if tangents is None else tangents + step
    assert tangents is not None
    return readout.push_held(final, tangents)
