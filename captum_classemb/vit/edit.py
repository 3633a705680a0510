"""Edit a forward pass: run the model as if some patches had never been there.

Patches are dropped after position embeddings are added, so that the others stay where they are.
That is exact where positions enter through the embeddings alone; models whose attention reads
positions itself (rotary or relative ones) are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit.hooks import before, hooks_removed
from captum_classemb.vit.parts import Call, ViT

__all__ = ["keep_tokens", "remove_tokens", "removable_tokens", "run_blocks"]


def removable_tokens(vit: ViT, image_size: tuple[int, int]) -> int:
    """How many patches of an image can go at once.

    All of them, unless the readout reads patches, which leaves one for it to read.

    Args:
        vit: an adapted model.
        image_size: H, W.
    """
    h, w = vit.grid(image_size)
    stop = vit.readout.reads.stop
    prefix_alone = stop is not None and 0 < stop <= vit.prefix_tokens
    return h * w if prefix_alone else h * w - 1


def keep_tokens(tokens: Tensor, keep: Tensor, prefix_tokens: int) -> Tensor:
    """All prefix tokens and the patches that are kept.

    Args:
        tokens: B×N×D.
        keep: the patches to keep, counted row by row without prefix tokens, B×K, int64.
        prefix_tokens: P.

    Returns:
        B×(P+K)×D.

    Raises:
        InputError: if ``keep`` does not name patches of these images.
    """
    patches = tokens.shape[1] - prefix_tokens
    if keep.dim() != 2 or len(keep) != len(tokens) or keep.dtype != torch.int64:
        raise InputError(
            f"keep has shape {tuple(keep.shape)} and type {keep.dtype}: for {len(tokens)} images "
            f"it holds {len(tokens)}×K patch indices, int64."
        )
    if keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < patches:
        raise InputError(
            f"keep names patches {int(keep.min())} to {int(keep.max())}: the images have patches "
            f"0 to {patches - 1}."
        )
    index = (keep.to(tokens.device) + prefix_tokens)[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :prefix_tokens], tokens.gather(1, index)], 1)


@contextmanager
def remove_tokens(vit: ViT, keep: Tensor) -> Iterator[None]:
    """Within the context the model sees, of each image's patches, only those in ``keep``.

    Args:
        vit: an adapted model with absolute position embeddings.
        keep: the patches to keep, counted row by row, B×K, int64. The images of a batch keep
            equally many.

    Raises:
        UnsupportedModelError: if the model's attention reads positions itself; raised here or by
            the forward pass.
        InputError: raised by the forward pass if ``keep`` does not fit the images.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> vit = adapt(demo_vit())
        >>> with remove_tokens(vit, torch.tensor([[0, 1, 2]])):
        ...     vit(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    _refuse_biased_attention(vit)

    def drop(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _refuse_positions(vit, args, kwargs)
        kept = keep_tokens(Call(args, kwargs).argument(0), keep, vit.prefix_tokens)
        if args:
            return (kept, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): kept}

    with hooks_removed([before(vit.blocks[0].module, drop)]):
        yield


def run_blocks(vit: ViT, tokens: Tensor) -> Tensor:
    """The logits that follow from the tokens entering the first block.

    Args:
        vit: an adapted model with absolute position embeddings and a readout of its own.
        tokens: ``resid_pre`` of block 0, or some of its rows, B×N×D.

    Returns:
        B×C, without gradients.

    Raises:
        UnsupportedModelError: if the model's attention reads positions itself.
    """
    _refuse_biased_attention(vit)
    with torch.no_grad():
        for block in vit.blocks:
            output = block.module(tokens)
            tokens = output[0] if isinstance(output, tuple) else output
        return vit.readout(tokens[:, vit.readout.reads])  # type: ignore[no-any-return]


def _refuse_biased_attention(vit: ViT) -> None:
    """Relative positions that an attention module holds itself are there before any call."""
    for attention in (attention for block in vit.blocks for attention in block.attentions):
        if attention.bias(Call((), {}), slice(0, 1)) is not None:
            raise _position_error(vit)


def _refuse_positions(vit: ViT, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Rotary embeddings, relative biases and masks come to a block beside its tokens."""
    beside = [*args, *kwargs.values()][1:]
    while beside:
        item = beside.pop()
        if isinstance(item, (tuple, list)):
            beside.extend(item)
        elif isinstance(item, Tensor):
            raise _position_error(vit)


def _position_error(vit: ViT) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"attention of {type(vit.model).__qualname__} reads positions or masks itself, so a token "
        "cannot be taken out exactly: token removal needs a model with absolute position "
        "embeddings; perturb pixels instead."
    )
