"""Ablate memories and heads: set what enters W_O or an MLP's last layer to zero or to its mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from captum_classemb.edit.coefficients import (
    Layer,
    coefficients_changed,
    head_columns,
    memory_columns,
)
from captum_classemb.errors import InputError
from captum_classemb.vit.model import ViT


@contextmanager
def ablate_memories(
    vit: ViT,
    layer: Layer,
    memories: Mapping[int, Sequence[int]],
    *,
    reference: Tensor | None = None,
) -> Iterator[None]:
    """Within the context, the coefficients of some memories are 0, or their mean.

    Args:
        vit: an adapted model.
        layer: ``"attn"`` or ``"mlp"``.
        memories: for some blocks, which of their M memories; those of parallel modules are
            counted through.
        reference: images B×3×H×W: coefficients are set to their mean over these, token by token,
            instead of 0. They are run when the context is entered, within the edits around it.

    Raises:
        InputError: if a block or a memory is out of range, or, in the forward pass, if the
            images have another number of tokens than those of ``reference``.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> vit, images = adapt(demo_vit()), torch.rand(1, 3, 64, 64)
        >>> before = vit(images)
        >>> with ablate_memories(vit, "mlp", {0: [3, 17]}):
        ...     torch.equal(vit(images), before)
        False
    """
    columns = {
        block: memory_columns(vit, layer, block, chosen) for block, chosen in memories.items()
    }
    with _ablated(vit, layer, columns, reference):
        yield


@contextmanager
def ablate_heads(
    vit: ViT, heads: Mapping[int, Sequence[int]], *, reference: Tensor | None = None
) -> Iterator[None]:
    """Within the context, what some heads give to W_O is 0, or its mean.

    Where a norm or a gate lies between A·V and W_O, it is what comes after it.

    Args:
        vit: an adapted model.
        heads: for some blocks, which of their H heads; those of parallel modules are counted
            through.
        reference: as for :func:`ablate_memories`.

    Raises:
        InputError: as :func:`ablate_memories` does.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> vit, images = adapt(demo_vit()), torch.rand(4, 3, 64, 64)
        >>> with ablate_heads(vit, {0: [1], 2: [0, 3]}, reference=images):
        ...     vit(images).shape
        torch.Size([4, 10])
    """
    columns = {block: head_columns(vit, block, chosen) for block, chosen in heads.items()}
    with _ablated(vit, "attn", columns, reference):
        yield


@contextmanager
def _ablated(
    vit: ViT, layer: Layer, columns: Mapping[int, Tensor], reference: Tensor | None
) -> Iterator[None]:
    means: dict[tuple[int, int], Tensor] = {}

    def observe(block: int, own: Tensor, start: int) -> Tensor:
        means[block, start] = own.mean(0)
        return own

    if reference is not None:
        with (
            torch.no_grad(),
            coefficients_changed(vit, layer, {b: partial(observe, b) for b in columns}),
        ):
            vit(reference)

    def ablate(block: int, own: Tensor, start: int) -> Tensor:
        mean = means.get((block, start))
        if mean is not None and len(mean) != own.shape[1]:
            raise InputError(
                f"the mean is that of {len(mean)} tokens, the forward pass has {own.shape[1]}: the "
                "images of reference need the size of the others."
            )
        chosen = columns[block].to(own.device)[start : start + own.shape[-1]]
        return torch.where(chosen, own.new_zeros(()) if mean is None else mean, own)

    with coefficients_changed(vit, layer, {b: partial(ablate, b) for b in columns}):
        yield
