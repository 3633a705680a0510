"""Occlusion by taking tokens out, one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.attr.baselines._base import Baseline
from captum_classemb.edit.tokens import block_calls, keep_tokens, run_blocks

__all__ = ["TokenOcclusion"]


class TokenOcclusion(Baseline):
    """How much the target's logit falls when a patch is taken out of the sequence.

    The patch is removed after position embeddings are added, so the model never sees it. Costs one
    forward pass a patch.

    Args:
        model (nn.Module): a supported Vision Transformer with absolute position embeddings.
        batch_size (int, optional): how many sequences run at once. Default: 64
        readout (nn.Module, optional): maps features to logits. Default: the class embedding.

    Raises:
        UnsupportedModelError: if the model is not supported, or reads positions in its attention.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> TokenOcclusion(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self, model: nn.Module, batch_size: int = 64, readout: nn.Module | None = None
    ) -> None:
        super().__init__(model, readout)
        self.batch_size = batch_size

    def _token_scores(self, pixels: Tensor, target: Tensor, args: tuple[Any, ...]) -> Tensor:
        _, calls = block_calls(self.vit, pixels, args)
        tokens, last = calls[0].input, len(self.vit.blocks) - 1
        readout = self.readout.at(last, "resid_post")
        prefix = self.vit.prefix_tokens
        patches = tokens.shape[1] - prefix
        everyone = torch.arange(patches, device=tokens.device)
        others = torch.stack([everyone[everyone != p] for p in range(patches)])
        whole = run_blocks(self.vit, tokens, calls, readout).gather(1, target[:, None])
        scores = whole.new_zeros(len(pixels), tokens.shape[1])
        for b, image in enumerate(tokens):
            for gone in everyone.split(self.batch_size):
                kept = keep_tokens(image.expand(len(gone), -1, -1), others[gone], prefix)
                left = run_blocks(self.vit, kept, calls, readout)[:, target[b]]
                scores[b, prefix + gone] = (whole[b] - left).to(scores.dtype)
        return scores
