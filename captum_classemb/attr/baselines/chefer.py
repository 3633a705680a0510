"""Gradient-weighted attention relevance (Chefer, Gur & Wolf, ICCV 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.attr.baselines._base import Baseline, pooled_rows
from captum_classemb.vit.backward import attention_gradients

__all__ = ["CheferRelevance"]


class CheferRelevance(Baseline):
    """Relevance carried from block to block by attention where its gradient is positive.

    R ← R + mean over heads of (A ∘ ∂logit/∂A)⁺ · R, starting at the identity, read at the class
    token (Chefer et al. ICCV 2021, eq. 5 and 6, for self-attention). Costs one forward and one
    backward pass for each class.

    Args:
        model (nn.Module): a supported Vision Transformer that reads a class token.
        readout (nn.Module, optional): maps features to logits. Default: the class embedding.

    Raises:
        UnsupportedModelError: if the model is not supported, reads its patches, or its blocks have
            several attention modules.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> CheferRelevance(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, model: nn.Module, readout: nn.Module | None = None) -> None:
        super().__init__(model, readout)
        self.rows = pooled_rows(self)

    def _token_scores(self, pixels: Tensor, target: Tensor, args: tuple[Any, ...]) -> Tensor:
        pairs = attention_gradients(
            self.vit, pixels, lambda final: self._cotangent(final, target), args
        )
        relevance: Tensor | None = None
        # From the last block down, only the rows that are read have to be carried.
        for weights, gradient in reversed(pairs):
            step = (weights * gradient).relu().mean(1)
            if relevance is None:
                identity = torch.eye(step.shape[1], dtype=step.dtype, device=step.device)
                relevance = identity[self.rows].expand(len(step), -1, -1)
            relevance = relevance + relevance @ step
        assert relevance is not None
        return relevance.mean(1)
