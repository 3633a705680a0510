"""Gradient × input at every block of a model whose gradients are balanced (Mehri et al. 2025)."""

from __future__ import annotations

from torch import nn

from captum_classemb.attr.all_path import AllPathImportance

__all__ = ["LibraFullGrad"]


class LibraFullGrad(AllPathImportance):
    """LibraGrad's FullGrad+ of the logit, without the biases: all paths, the mean over blocks.

    The gradient keeps attention, the σ of norms and the gates of activations constant, and halves
    products (Mehri, Soleymani Baghshah and Pilehvar, CVPR 2025); a patch scores Σ over the width
    of token × gradient at every block. It is ``AllPathImportance(objective="logit")``, and costs
    one forward pass and one chain of transposed products.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.

    Raises:
        UnsupportedModelError: if the model is not supported, or its adapter does not say how
            every block makes its branches.

    Examples:
        >>> import torch
        >>> from captum_classemb.models import demo_vit
        >>> LibraFullGrad(demo_vit()).attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, model: nn.Module, readout: nn.Module | None = None) -> None:
        super().__init__(model, readout, "logit")
