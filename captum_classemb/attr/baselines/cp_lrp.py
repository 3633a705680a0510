"""Gradient × input with attention, norms and activations frozen."""

from __future__ import annotations

from torch import Tensor

from captum_classemb.attr.baselines.libra import LibraFullGrad
from captum_classemb.vit.memories import ForwardPass

__all__ = ["CPLRP"]


class CPLRP(LibraFullGrad):
    """Input × the gradient of a model whose only variables are its additions.

    Attention probabilities, the σ of norms and the ratio act(x)/x of activations are held at their
    values, which makes the model linear in the tokens entering the first block; a patch scores
    Σ over the width of token × gradient there. This is the conservative propagation of Ali et al.
    (ICML 2022) with the ratio rule for activations, which lxt calls CP-LRP; AttnLRP (Achtibat et
    al., ICML 2024) differs in attention's product A·V, of which A gets relevance too. It is the
    first block of :class:`LibraFullGrad`.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.

    Raises:
        UnsupportedModelError: if the model is not supported, or its adapter does not say how
            every block makes its branches.

    Examples:
        >>> import torch
        >>> from captum_classemb.models import demo_vit
        >>> CPLRP(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def _followed(self, done: ForwardPass, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        entries, biases = super()._followed(done, cotangent)
        return entries[:1], biases[:1]
