"""Patch every block, and every token or head in turn, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from captum_classemb.edit.coefficients import head_columns
from captum_classemb.edit.patching import Source, fitting, observed, part_of, patched
from captum_classemb.errors import InputError
from captum_classemb.vit.model import ViT

__all__ = ["patching_sweep"]

#: From images B×3×H×W and which of the sweep's images each is (int64, B) to B×….
Read = Callable[[Tensor, Tensor], Tensor]


def patching_sweep(
    vit: ViT,
    images: Tensor,
    source: Source,
    site: str = "resid_pre",
    *,
    over: Literal["tokens", "heads"] = "tokens",
    groups: Tensor | Sequence[Sequence[int]] | None = None,
    blocks: Sequence[int] | None = None,
    read: Read | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Patch one block and one group of tokens or heads at a time, and read each result.

    The activations of ``source`` are computed once; patched passes of several blocks, groups and
    images are run as one batch, without gradients.

    Args:
        vit: an adapted model.
        images: those that are patched, B×3×H×W.
        source: as for :func:`patch_activations`.
        site: likewise; heads have one of their own, ``"attn_coefficients"``.
        over: whether groups are of ``"tokens"`` or of ``"heads"``.
        groups: the tokens (or heads) that are patched together: for each group their indices, or
            bool, G×N (G×H), or for tokens also G×B×N; by default each alone.
        blocks: the blocks L' that are patched; all by default.
        read: called with B' images in the context of a patch and, for each, which of ``images`` it
            is (int64, B'); returns a tensor B'×…. The logits by default.
        batch_size: the largest B'.

    Returns:
        L'×G×B×…: what ``read`` returned.

    Raises:
        InputError: as :func:`patch_activations` does.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> vit, clean, corrupted = adapt(demo_vit()), *torch.rand(2, 1, 3, 64, 64)
        >>> patching_sweep(
        ...     vit, corrupted, clean, "attn_coefficients", over="heads", blocks=[2, 3]
        ... ).shape
        torch.Size([2, 4, 1, 10])
    """
    if over not in ("tokens", "heads"):
        raise InputError(f"over={over!r} is neither 'tokens' nor 'heads'.")
    if over == "heads" and site != "attn_coefficients":
        raise InputError(f"heads are summed up at {site}: sweep site='attn_coefficients'.")
    chosen = [i % len(vit.blocks) for i in (range(len(vit.blocks)) if blocks is None else blocks)]
    for block in chosen:
        vit.block(block)
    masks = _masks(vit, images, over, groups)
    if isinstance(source, Tensor):
        source = observed(vit, site, source, chosen)
    number, batch = len(masks), len(images)
    rows = torch.cartesian_prod(*(torch.arange(n) for n in (len(chosen), number, batch)))
    found = []
    for some in rows.view(-1, 3).split(batch_size):
        place, group, which = some.unbind(1)
        changes = {
            chosen[i]: _change(vit, source, site, chosen[i], over, masks[group], which, place == i)
            for i in place.unique().tolist()
        }
        pixels = images[which.to(images.device)]
        with torch.no_grad(), patched(vit, site, changes):
            found.append(vit(pixels) if read is None else read(pixels, which.to(images.device)))
    whole: Tensor = torch.cat(found).unflatten(0, (len(chosen), number, batch))
    return whole


def _masks(
    vit: ViT, images: Tensor, over: str, groups: Tensor | Sequence[Sequence[int]] | None
) -> Tensor:
    """Groups as bool: G×B×N of tokens, G×H of heads."""
    if over == "heads":
        count = sum(attention.heads for attention in vit.blocks[0].attentions)
    else:
        h, w = vit.grid((images.shape[2], images.shape[3]))
        count = vit.prefix_tokens + h * w
    if groups is None:
        masks = torch.eye(count, dtype=torch.bool)
    elif isinstance(groups, Tensor) and groups.dtype == torch.bool:
        masks = groups
    else:
        masks = torch.zeros(len(groups), count, dtype=torch.bool)
        for mask, group in zip(masks, groups, strict=True):
            for index in group:
                if not 0 <= int(index) < count:
                    raise InputError(f"groups name {over[:-1]} {int(index)} of {count}.")
                mask[int(index)] = True
    if over == "tokens" and masks.dim() == 2:
        masks = masks[:, None].expand(-1, len(images), -1)
    expected = (len(masks), count) if over == "heads" else (len(masks), len(images), count)
    if masks.shape != expected:
        raise InputError(f"groups have shape {tuple(masks.shape)}: {expected} is needed.")
    return masks


def _change(
    vit: ViT,
    source: Any,
    site: str,
    block: int,
    over: str,
    masks: Tensor,
    which: Tensor,
    here: Tensor,
) -> Callable[[Tensor, int], Tensor]:
    """What takes the place of a block's activations in those rows of a batch that patch it."""
    if over == "heads":
        heads = range(masks.shape[1])
        columns = torch.stack([head_columns(vit, block, [head]) for head in heads])
        chosen = (masks.float() @ columns.float()).bool()[:, None]
    else:
        chosen = masks[torch.arange(len(which)), which][..., None]
    chosen = chosen & here[:, None, None]

    def replace(own: Tensor, start: int) -> Tensor:
        stop, mask = start + own.shape[-1], chosen.to(own.device)
        if over == "heads":
            mask = mask[..., start:stop]
        elif mask.shape[1] != own.shape[1]:
            raise InputError(
                f"{site} of block {block} has {own.shape[1]} tokens, the images have "
                f"{mask.shape[1]}."
            )
        if callable(source):
            made = source(own)
        else:
            made = part_of(source[block], start, stop)
            if isinstance(made, Tensor) and made.dim() == own.dim() and len(made) > 1:
                made = made[which.to(made.device)]
        return torch.where(mask, fitting(made, own, site, block), own)

    return replace
