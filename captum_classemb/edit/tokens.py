"""Which tokens are left when patches are removed, and the rest of the model run on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.hooks import before, hooks_removed
from captum_classemb.readout import Readout
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import Call


class Kept(NamedTuple):
    """Which tokens are left of each image, in the order of the image.

    Attributes:
        places: among all tokens, prefix tokens included, int64, B×(P+K), K being the
            largest number of patches that any image keeps.
        real: False for tokens that only fill up an image which keeps fewer, bool, B×(P+K).
    """

    places: Tensor
    real: Tensor


def removable_tokens(vit: ViT, image_size: tuple[int, int]) -> int:
    """How many patches of an image can go at once.

    All of them, unless the readout reads patches, which leaves one for it to read.

    Args:
        vit: an adapted model.
        image_size: H, W.
    """
    h, w = vit.grid(image_size)
    return h * w - 1 if reads_patches(vit) else h * w


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


def kept_tokens(keep: Tensor, prefix_tokens: int) -> Kept:
    """The tokens that :func:`remove_tokens` leaves, row by row of what is recorded within it.

    Args:
        keep: as for :func:`remove_tokens`.
        prefix_tokens: P.

    Raises:
        InputError: if ``keep`` is neither indices nor a mask.

    Examples:
        >>> kept = kept_tokens(torch.tensor([[True, False, True], [False, True, False]]), 1)
        >>> kept.places.tolist(), kept.real.int().tolist()
        ([[0, 1, 3], [0, 2, 1]], [[1, 1, 1], [1, 1, 0]])
    """
    if keep.dim() != 2 or keep.dtype not in (torch.bool, torch.int64):
        raise InputError(
            f"keep has shape {tuple(keep.shape)} and type {keep.dtype}: it holds images×patches, "
            "bool, or images×K patch indices, int64."
        )
    if keep.dtype == torch.bool:
        counts = keep.sum(1)
        places = keep.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        places = places[:, : int(counts.max()) if len(counts) else 0]
    else:
        places = keep.sort(1).values
        counts = places.new_full((len(keep),), places.shape[1])
    real = torch.arange(places.shape[1], device=keep.device) < counts[:, None]
    prefix = torch.arange(prefix_tokens, device=keep.device).expand(len(keep), -1)
    return Kept(
        torch.cat([prefix, places + prefix_tokens], 1),
        torch.cat([torch.ones_like(prefix, dtype=torch.bool), real], 1),
    )


def reads_patches(vit: ViT) -> bool:
    """Whether the readout reads more than prefix tokens."""
    stop = vit.readout.reads.stop
    return not (stop is not None and 0 < stop <= vit.prefix_tokens)


def refuse_class_attention(vit: ViT) -> None:
    """Raise UnsupportedModelError if patches attend to each other before the blocks of the ViT."""
    if any(block.stream for block in vit.blocks):
        raise UnsupportedModelError(
            f"patches of {type(vit.model).__qualname__} attend to each other before the blocks of "
            "class attention, which are the ones the library reads: neither can they be removed "
            "nor their attention be cut there."
        )


def block_calls(
    vit: ViT, inputs: Tensor, forward_args: tuple[Any, ...] = ()
) -> tuple[Tensor, list[Call]]:
    """The logits of images, and how each block was called on the way, without gradients."""
    calls: list[Call] = []

    def enter(args: tuple[Any, ...], kwargs: Any) -> None:
        calls.append(Call(args, dict(kwargs)))

    hooks = [before(block.module, enter) for block in vit.blocks]
    with hooks_removed(hooks), torch.no_grad():
        logits = vit(inputs, *forward_args)
    return logits, calls


def run_blocks(
    vit: ViT, tokens: Tensor, calls: Sequence[Call], readout: Readout | None = None
) -> Tensor:
    """The logits that follow from the tokens entering the first block.

    Args:
        vit: an adapted model with absolute position embeddings.
        tokens: what enters block 0, or some of its rows, B×N×D.
        calls: how each block is called, from :func:`block_calls`; the tokens take the place of
            those that entered then.
        readout: what reads the last tokens; the model's own by default.

    Returns:
        B×C, without gradients.

    Raises:
        UnsupportedModelError: if the model's attention reads positions itself, or its blocks
            are of class attention.
    """
    refuse_class_attention(vit)
    own = (attention for block in vit.blocks for attention in block.attentions)
    beside = [value for call in calls for value in (*call.args, *call.kwargs.values())[1:]]
    held = any(isinstance(value, (Tensor, tuple, list)) and len(value) for value in beside)
    if held or any(attention.bias(Call((), {}), slice(0, 1)) is not None for attention in own):
        raise UnsupportedModelError(
            f"attention of {type(vit.model).__qualname__} reads positions itself, so its "
            "blocks cannot be run on tokens alone: a model with absolute position embeddings "
            "can; perturb pixels instead."
        )
    readout = vit.readout if readout is None else readout
    with torch.no_grad():
        for block, call in zip(vit.blocks, calls, strict=True):
            named = dict(call.kwargs)
            if not call.args:
                named[next(iter(named))] = tokens
            output = block.module(*((tokens, *call.args[1:]) if call.args else ()), **named)
            tokens = output[0] if isinstance(output, tuple) else output
        return readout(tokens[:, readout.reads])  # type: ignore[no-any-return]
