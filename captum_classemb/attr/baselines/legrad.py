"""LeGrad: gradients of each block's own prediction with respect to its attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_classemb.attr.baselines._base import Baseline
from captum_classemb.functional.precision import upcast
from captum_classemb.vit.backward import watched

__all__ = ["LeGrad"]


class LeGrad(Baseline):
    """Positive gradients of each block's logit with respect to its attention, summed over blocks.

    The mean of all tokens at a block's output is read by the class embedding; the logit is
    differentiated with respect to that block's attention map, negative parts are dropped, and
    heads and query rows averaged (Bousselham et al. 2024, as their code does it). Costs one
    forward pass and, for each class, a backward pass through the upper part of every block.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (nn.Module, optional): maps features to logits. Default: the class embedding.

    Raises:
        UnsupportedModelError: if the model is not supported, or its blocks have several attention
            modules.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> LeGrad(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def _token_scores(self, pixels: Tensor, target: Tensor, args: tuple[Any, ...]) -> Tensor:
        total: Tensor | None = None
        with watched(self.vit) as tape:
            self.vit(pixels, *args)
            for block, tokens in enumerate(tape.resid_post):
                readout = self.readout.at(block, "resid_post")
                mean = upcast(tokens).mean(1, keepdim=True).expand_as(tokens[:, readout.reads])
                score = readout(mean).gather(1, target[:, None]).sum()
                (of_output,) = torch.autograd.grad(score, tape.output(block), retain_graph=True)
                positive = tape.gradient(block, of_output).relu().mean((1, 2))
                total = positive if total is None else total + positive
        assert total is not None
        return total.detach()
