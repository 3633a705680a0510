"""Parts of removal curves: scores of patches, their order, and measures of the prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.functional.grid import patch_index

#: What is measured at each point of a removal curve.
MEASURES = ("accuracy", "probability", "logit")


def patch_sums(
    attributions: Tensor, grid: tuple[int, int], patch_size: tuple[int, int] | None = None
) -> Tensor:
    """The scores of patches that scores of pixels add up to.

    Args:
        attributions: B×channels×H×W.
        grid: h, w.
        patch_size: pixels of a patch; needed where the patches do not fill the image exactly.

    Returns:
        B×h×w.

    Examples:
        >>> patch_sums(torch.ones(1, 3, 4, 4), (2, 2))
        tensor([[[12., 12.],
                 [12., 12.]]])
    """
    size = (attributions.shape[-2], attributions.shape[-1])
    index = patch_index(size, grid, patch_size).flatten()
    pixels = attributions.sum(1).flatten(1)
    sums = pixels.new_zeros(len(pixels), grid[0] * grid[1])
    sums.index_add_(1, index.to(pixels.device), pixels)
    return sums.view(len(pixels), *grid)


def removal_order(scores: Tensor) -> Tensor:
    """Patches from the least to the most important, counted row by row.

    Equal scores are ordered by one fixed shuffle of the grid: row by row, a map with many zeros
    would lose its patches from one corner.

    Args:
        scores: B×h×w.

    Returns:
        int64, B×T.

    Raises:
        InputError: if the scores are not B×h×w.
        NonFiniteError: if a score is NaN or infinite.

    Examples:
        >>> removal_order(torch.tensor([[[0.3, 0.1, 0.2]]]))
        tensor([[1, 2, 0]])
    """
    if scores.dim() != 3:
        raise InputError(f"scores of shape {tuple(scores.shape)} are not B×h×w.")
    if not torch.isfinite(scores).all():
        raise NonFiniteError("scores hold NaN or infinity: an order needs finite numbers.")
    flat = scores.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))
    shuffle = shuffle.to(flat.device)
    return shuffle[flat[:, shuffle].argsort(dim=1, stable=True)]


def outcomes(logits: Tensor, target: Tensor) -> Tensor:
    """Whether the target is predicted, its probability and its logit: B×3, as :data:`MEASURES`.

    Args:
        logits: B×C.
        target: class indices, B.

    Examples:
        >>> outcomes(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([[1.0000, 0.5000, 0.0000]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = target[:, None]
    correct = (logits.argmax(-1) == target).to(logits)
    probability = logits.softmax(-1).gather(1, index)[:, 0]
    return torch.stack([correct, probability, logits.gather(1, index)[:, 0]], -1)
