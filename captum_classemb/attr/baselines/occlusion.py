"""Occlusion by taking tokens out, one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.attr.baselines._base import Baseline
from captum_classemb.edit.tokens import keep_tokens, run_blocks
from captum_classemb.vit import record

__all__ = ["TokenOcclusion"]


class TokenOcclusion(Baseline):
    """How much the target's logit falls when a patch is taken out of the sequence.

    The patch is removed after position embeddings are added, so the model never sees it. Costs one
    forward pass a patch.

    Args:
        model (nn.Module): a supported Vision Transformer with absolute position embeddings.
        batch_size (int, optional): how many sequences run at once. Default: 64

    Raises:
        UnsupportedModelError: if the model is not supported, or reads positions in its attention.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> TokenOcclusion(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, model: nn.Module, batch_size: int = 64) -> None:
        super().__init__(model)
        self.batch_size = batch_size

    def _token_scores(self, pixels: Tensor, target: Tensor, args: tuple[Any, ...]) -> Tensor:
        recording = record(self.vit, pixels, ["embedding"], forward_args=args)
        tokens: Tensor = recording["embedding"][0]
        prefix = self.vit.prefix_tokens
        patches = tokens.shape[1] - prefix
        everyone = torch.arange(patches, device=tokens.device)
        others = torch.stack([everyone[everyone != p] for p in range(patches)])
        scores = recording.logits.new_zeros(len(pixels), tokens.shape[1])
        whole = run_blocks(self.vit, tokens).gather(1, target[:, None])
        for b, image in enumerate(tokens):
            for gone in everyone.split(self.batch_size):
                kept = keep_tokens(image.expand(len(gone), -1, -1), others[gone], prefix)
                left = run_blocks(self.vit, kept)[:, target[b]]
                scores[b, prefix + gone] = (whole[b] - left).to(scores.dtype)
        return scores
