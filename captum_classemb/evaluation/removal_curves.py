"""Removal curves: predictions as patches are removed, least or most important first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.edit import remove_tokens
from captum_classemb.edit.tokens import block_calls, keep_tokens, removable_tokens, run_blocks
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.evaluation.areas import removal_counts
from captum_classemb.evaluation.removal_order import outcomes, patch_sums, removal_order
from captum_classemb.functional.grid import tile
from captum_classemb.vit import Call, ViT, adapt

Perturbation = Literal["tokens", "mean", "blur"]


class Curves(NamedTuple):
    """The curves of a batch of images.

    ``values[b, o, s, m]`` is the measure m (accuracy, probability, logit of the target) of image b
    when ``removed[s]`` patches are gone in the order o: least important first (o = 0, negative) or
    most important first (o = 1, positive). ``patches`` is T, the number of patches of an image.
    """

    removed: Tensor
    values: Tensor
    patches: int


def removal_curves(
    model: nn.Module,
    inputs: Tensor,
    scores: Tensor,
    target: Tensor,
    *,
    steps: int = 20,
    perturbation: Perturbation = "tokens",
) -> Curves:
    """Remove patches in the order of a map and in its reverse.

    ``"tokens"`` takes the patches out of the sequence after position embeddings are added: the
    model never sees them, all images of a batch lose equally many, and cost falls with the tokens.
    The embeddings are computed once. ``"mean"`` paints patches in the image's mean colour,
    ``"blur"`` replaces them by a blurred image (a Gaussian whose σ is the patch size).

    Args:
        model: a supported Vision Transformer.
        inputs: images, B×3×H×W.
        scores: importance of the patches, B×h×w; or attributions of the inputs' shape, which are
            summed over each patch.
        target: the class measured, B.
        steps: the number of evenly spaced points after the unperturbed one. With as many steps as
            patches one goes at a time.
        perturbation: ``"tokens"``, ``"mean"`` or ``"blur"``.

    Returns:
        removed (S = steps + 1) and values (B×2×S×3, float32). Where the readout reads patches, one
        token is left at the last point.

    Raises:
        InputError: if scores or target do not fit the inputs, or an option has no such value.
        NonFiniteError: if a score is NaN or infinite.
        UnsupportedModelError: if tokens cannot be taken out of this model exactly.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> images, maps = torch.rand(2, 3, 64, 64), torch.rand(2, 8, 8)
        >>> removal_curves(demo_vit(), images, maps, torch.tensor([3, 4]), steps=4).values.shape
        torch.Size([2, 2, 5, 3])
    """
    if perturbation not in get_args(Perturbation):
        names = ", ".join(map(repr, get_args(Perturbation)))
        raise InputError(f"perturbation {perturbation!r} is none of {names}.")
    vit = adapt(model)
    vit.check_inputs(inputs)
    image_size = (inputs.shape[2], inputs.shape[3])
    grid = vit.grid(image_size)
    if scores.shape == inputs.shape:
        scores = patch_sums(scores, grid, vit.patch_pixels(image_size))
    if scores.shape != (len(inputs), *grid):
        raise InputError(
            f"scores of shape {tuple(scores.shape)} fit neither the inputs {tuple(inputs.shape)} "
            f"nor their {grid[0]}×{grid[1]} patches."
        )
    if target.shape != (len(inputs),):
        raise InputError(f"{len(inputs)} images need {len(inputs)} targets: {tuple(target.shape)}.")
    order = removal_order(scores.to(inputs.device))
    orders = torch.stack([order, order.flip(1)])
    return curves_in_orders(vit, inputs, orders, target, steps, perturbation)


def curves_in_orders(
    vit: ViT, inputs: Tensor, orders: Tensor, target: Tensor, steps: int, perturbation: Perturbation
) -> Curves:
    """Remove patches in O given orders, O×B×T; the rest as for :func:`removal_curves`."""
    image_size = (inputs.shape[2], inputs.shape[3])
    orders, target = orders.to(inputs.device), target.to(inputs.device)
    with torch.no_grad():
        if perturbation == "tokens":
            removed = removal_counts(removable_tokens(vit, image_size), steps + 1)
            logits = _without_tokens(vit, inputs.to(vit.dtype), orders, removed)
        else:
            removed = removal_counts(orders.shape[2], steps + 1)
            fill = _fill(inputs, perturbation, vit.patch_size)
            logits = _without_pixels(vit, inputs, fill, orders, removed)
        every = target.repeat(len(orders))
        points = [outcomes(at, every).unflatten(0, (len(orders), len(target))) for at in logits]
    values = torch.stack(points, 2).transpose(0, 1).float()
    return Curves(removed, values, orders.shape[2])


def _kept(orders: Tensor, removed: Tensor) -> Iterator[Tensor]:
    """The patches left at each perturbed point: (O·B)×K, one order after the other."""
    for count in removed[1:].tolist():
        yield orders[:, :, count:].flatten(0, 1)


def _without_tokens(vit: ViT, inputs: Tensor, orders: Tensor, removed: Tensor) -> Iterator[Tensor]:
    whole, calls = block_calls(vit, inputs)
    tokens = calls[0].argument(vit.blocks[0].stream)
    yield whole.repeat(len(orders), 1)
    if _resumes(vit, tokens[:1], calls, whole[:1]):
        every = tokens.repeat(len(orders), 1, 1)
        for kept in _kept(orders, removed):
            yield run_blocks(vit, keep_tokens(every, kept, vit.prefix_tokens), calls)
        return
    # More than tokens enters the blocks (rotary positions, tables): the model itself is run.
    every = inputs.repeat(len(orders), 1, 1, 1)
    for kept in _kept(orders, removed):
        with remove_tokens(vit, kept):
            yield vit(every)


def _resumes(vit: ViT, tokens: Tensor, calls: Sequence[Call], logits: Tensor) -> bool:
    """Whether the rest of the model, run from its tokens, is the model."""
    try:
        resumed = run_blocks(vit, tokens, calls).to(logits)
    except UnsupportedModelError:
        return False
    # Half precision rounds at other places in a batch of one; a missing part is of the size of 1.
    allowed = 4 * torch.finfo(logits.dtype).eps ** 0.5
    difference = (resumed - logits).norm()
    return bool(difference <= min(allowed, 0.2) * (logits.norm() + 1))


def _without_pixels(
    vit: ViT,
    inputs: Tensor,
    fill: Tensor,
    orders: Tensor,
    removed: Tensor,
) -> Iterator[Tensor]:
    yield vit(inputs.to(vit.dtype)).repeat(len(orders), 1)
    every, fills = (x.repeat(len(orders), 1, 1, 1) for x in (inputs, fill))
    for kept in _kept(orders, removed):
        visible = torch.zeros(len(kept), orders.shape[2], dtype=torch.bool, device=inputs.device)
        visible.scatter_(1, kept, True)
        size = (inputs.shape[2], inputs.shape[3])
        shown = tile(visible.unflatten(1, vit.grid(size)), size, vit.patch_pixels(size))
        yield vit(torch.where(shown[:, None], every, fills).to(vit.dtype))


def _fill(inputs: Tensor, perturbation: Perturbation, patch_size: tuple[int, int]) -> Tensor:
    if perturbation == "mean":
        return inputs.mean((2, 3), keepdim=True).expand_as(inputs)
    blurred = inputs
    for dim, sigma in ((2, patch_size[0]), (3, patch_size[1])):
        # Reflection needs a margin below the image's own size.
        reach = min(3 * sigma, inputs.shape[dim] - 1)
        offsets = torch.arange(-reach, reach + 1, device=inputs.device, dtype=inputs.dtype)
        kernel = (-0.5 * (offsets / sigma) ** 2).softmax(0)
        shape = [1, 1, 1, 1]
        shape[dim] = len(kernel)
        pad = [0, 0, reach, reach] if dim == 2 else [reach, reach, 0, 0]
        weight = kernel.view(shape).repeat(inputs.shape[1], 1, 1, 1)
        blurred = F.conv2d(F.pad(blurred, pad, mode="reflect"), weight, groups=inputs.shape[1])
    return blurred
