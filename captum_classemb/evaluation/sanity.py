"""Whether maps depend on what the model has learnt (Adebayo et al., NeurIPS 2018)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from captum_classemb.functional.correlation import rank_correlation


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of the model whose learnt parameters are shuffled, each within itself.

    Shuffling keeps the distribution of every parameter, so that activations stay of the size they
    were, and takes away what training put where.

    Args:
        model: left as it is.
        seed: of the shuffles.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            flat = parameter.flatten()[order.to(parameter.device)]
            parameter.copy_(flat.view_as(parameter))
    return other


def randomisation_check(
    maps: Callable[[nn.Module, Tensor, Tensor], Tensor],
    model: nn.Module,
    inputs: Tensor,
    target: Tensor,
    seed: int = 0,
) -> Tensor:
    """Rank correlation of a method's maps for a model and for the same model randomised.

    A method that shows edges of the image instead of what the model does scores near 1.

    Args:
        maps: from model, images B×3×H×W and targets B to maps B×h×w.
        model: a model that the method explains.
        inputs: B×3×H×W.
        target: B.
        seed: of the randomisation.

    Returns:
        float64, B.

    Examples:
        >>> from captum_classemb.attr import ClassEmbeddingGradient
        >>> from captum_classemb.models import demo_vit
        >>> def maps(model, inputs, target):
        ...     return ClassEmbeddingGradient(model).attribute_patches(inputs, target).sum((1, 2))
        >>> images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
        >>> randomisation_check(maps, demo_vit(), images, target).shape
        torch.Size([2])
    """
    trained = maps(model, inputs, target)
    return rank_correlation(trained, maps(randomised(model, seed), inputs, target))
