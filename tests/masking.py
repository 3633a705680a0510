"""Edited forward passes by brute force: attention is computed explicitly, with weights as told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from anatomy import anatomy
from oracle import logits_of
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[Tensor], Tensor]


@contextmanager
def explicit_attention(attend: Attend, count: int) -> Iterator[None]:
    """The first ``count`` attention maps are ``attend(scores)``; later ones are plain."""
    left = [count]

    def weigh(scores: Tensor) -> Tensor:
        left[0] -= 1
        return attend(scores) if left[0] >= 0 else scores.softmax(-1)

    def explicit(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Tensor:
        assert dropout_p == 0.0 and not is_causal
        scores = query @ key.transpose(-2, -1) * (rest.get("scale") or query.shape[-1] ** -0.5)
        return weigh(scores if attn_mask is None else scores + attn_mask) @ value

    def eager(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return weigh(scores.to(dtype or scores.dtype))

    fused, softmax = F.scaled_dot_product_attention, F.softmax
    F.scaled_dot_product_attention, F.softmax = explicit, eager  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.softmax = fused, softmax
    assert left[0] <= 0, "the model has fewer attention maps than its anatomy says"


def edited_logits(model: nn.Module, images: Tensor, attend: Attend) -> Tensor:
    """Logits of the model whose blocks attend as told."""
    parts = [part for layer in anatomy(model).layers for part in layer.attentions]
    with torch.no_grad(), explicit_attention(attend, sum(part.calls for part in parts)):
        return logits_of(model(images))


def logits_without(
    model: nn.Module, images: Tensor, kept: Tensor, cut: Tensor | None = None
) -> Tensor:
    """Logits if nobody attends to patches that are not kept (B×T), nor the readout reads them.

    Queries are also cut off from keys by ``cut``, B×N×N.
    """
    structure = anatomy(model)
    kept = F.pad(kept, (structure.prefix, 0), value=True)
    final = []
    handle = structure.layers[-1].block.register_forward_hook(
        lambda module, args, output: final.append(output)
    )
    try:
        hidden = ~kept[:, None, None]
        hidden = hidden if cut is None else hidden | cut[:, None]
        edited_logits(model, images, lambda s: s.masked_fill(hidden, -torch.inf).softmax(-1))
    finally:
        handle.remove()
    tokens = final[0][0] if isinstance(final[0], tuple) else final[0]
    with torch.no_grad():
        read = [structure.read(x[rows][None]) for x, rows in zip(tokens, kept, strict=True)]
    return torch.cat(read)


def without_columns(model: nn.Module, layer: str, block: int, columns: list[int]) -> nn.Module:
    """A copy of the model whose memories write nothing, counted through parallel modules."""
    model = copy.deepcopy(model)
    parts: Any = anatomy(model).layers[block]
    start = 0
    for part in parts.attentions if layer == "attn" else parts.mlps:
        weight = (part.proj if layer == "attn" else part.fc2).weight.data[:, part.columns]
        inside = [i - start for i in columns if start <= i < start + weight.shape[1]]
        weight[:, inside] = 0.0
        start += weight.shape[1]
    return model


def unfused(model: nn.Module) -> nn.Module:
    """Attention of timm's modules in single steps."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model
