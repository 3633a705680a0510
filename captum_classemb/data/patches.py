"""From masks of pixels to masks of patches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from captum_classemb.data.sample import CONTEXT, IGNORED, OBJECT
from captum_classemb.errors import InputError

PatchRule = Literal["nearest", "majority"]


def patch_mask(mask: Tensor, grid: tuple[int, int], rule: PatchRule = "majority") -> Tensor:
    """Which patches show the labelled object.

    ``"majority"`` gives each patch the value that most of its pixels have (on a tie the object
    comes first, then context). ``"nearest"`` gives it the value of its top-left pixel, as the
    published code of Vilas et al. does.

    Args:
        mask: …×H×W of 0 (context), 1 (object) and 255 (ignored), or bool.
        grid: rows h and columns w of the patch grid.
        rule: ``"majority"`` or ``"nearest"``.

    Returns:
        uint8, …×h×w.

    Raises:
        InputError: for an unknown rule, or a grid that does not divide the mask.

    Examples:
        >>> patch_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]), (1, 2), "nearest")
        tensor([[0, 1]], dtype=torch.uint8)
        >>> patch_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]), (1, 2), "majority")
        tensor([[1, 1]], dtype=torch.uint8)
    """
    mask = mask.to(torch.uint8)
    height, width = mask.shape[-2:]
    h, w = grid
    if height % h or width % w:
        raise InputError(f"a grid of {h}×{w} patches does not divide a mask of {height}×{width}.")
    if rule == "nearest":
        return mask[..., :: height // h, :: width // w]
    if rule != "majority":
        raise InputError(f"patch rule {rule!r} is unknown: give 'majority' or 'nearest'.")
    cells = mask.unflatten(-1, (w, -1)).unflatten(-3, (h, -1)).transpose(-3, -2).flatten(-2)
    order = torch.tensor([OBJECT, CONTEXT, IGNORED], dtype=torch.uint8, device=mask.device)
    votes = torch.stack([(cells == value).sum(-1) for value in order], dim=-1)
    return order[votes.argmax(-1)]
