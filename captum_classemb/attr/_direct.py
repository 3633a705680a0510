"""What attention adds to the logits directly: each source token's entries, later blocks aside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_classemb.attr._heads import source_tangents, stack_heads
from captum_classemb.functional.attention import attention_contributions
from captum_classemb.readout import Chain, ClassEmbedding

__all__ = ["direct_entries", "direct_features"]


def direct_entries(
    tails: Sequence[Chain], weights: Sequence[Tensor], values: Sequence[Tensor], u: Tensor
) -> tuple[Tensor, Tensor]:
    """A·v·(W_Oᵀu) of one block, with every σ on the way held.

    Args:
        tails: the way from A·V to the residual stream, for each attention module.
        weights: A of the rows read, B×H×Q×N for each module.
        values: v, B×H×N×d for each module.
        u: the direction of the residual stream that is read, B×Q×D.

    Returns:
        the entries of heads and source tokens, B×ΣH×N, and what biases on the way add, B.
    """
    entries, total = [], u.new_zeros(len(u))
    for tail, a, v in zip(tails, weights, values, strict=True):
        z, bias = tail.pull_offsets(u)
        heads = z.unflatten(-1, (v.shape[1], -1)).transpose(1, 2)
        entries.append(attention_contributions(a, v, heads))
        total = total + bias
    return stack_heads(entries), total


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
        tails: as for :func:`direct_entries`, block by block.
        attention: A, likewise.
        values: v, likewise.
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
