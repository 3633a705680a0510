"""Change the coefficients of memories: what enters W_O, or the last layer of an MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from captum_classemb.edit.attention_edit import AttentionEdit
from captum_classemb.errors import InputError
from captum_classemb.hooks import before, hooks_removed
from captum_classemb.vit.active_edits import marked, unless_paused
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Attention

__all__ = ["Layer", "coefficients_changed", "head_columns", "memory_columns"]

Layer = Literal["attn", "mlp"]

#: From coefficients B×N×M of one module, and where its memories begin among the block's.
Change = Callable[[Tensor, int], Tensor]


def _owners(vit: ViT, layer: Layer, block: int) -> tuple[Attention, ...] | tuple[MLP, ...]:
    if layer not in get_args(Layer):
        raise InputError(f"layer {layer!r} is neither 'attn' nor 'mlp'.")
    chosen = vit.block(block)
    return chosen.attentions if layer == "attn" else chosen.mlps


def _width(owner: Attention | MLP) -> int:
    """M of one module."""
    return int(owner.proj.weight.shape[1])


def memory_columns(vit: ViT, layer: Layer, block: int, memories: Sequence[int]) -> Tensor:
    """Some of the memories of a block, those of parallel modules counted through: bool, M.

    Raises:
        InputError: if the block lacks one of them.
    """
    count = sum(_width(owner) for owner in _owners(vit, layer, block))
    return _chosen(memories, count, "memory")


def head_columns(vit: ViT, block: int, heads: Sequence[int]) -> Tensor:
    """The memories of some heads of a block, those of parallel modules counted through: bool, M.

    Raises:
        InputError: if the block lacks one of them.
    """
    attentions = vit.block(block).attentions
    sizes = [attention.heads for attention in attentions]
    parts = _chosen(heads, sum(sizes), "head").split(sizes)
    widths = [_width(attention) // attention.heads for attention in attentions]
    return torch.cat([p.repeat_interleave(w) for p, w in zip(parts, widths, strict=True)])


def _chosen(indices: Sequence[int], count: int, what: str) -> Tensor:
    for index in indices:
        if not 0 <= index < count:
            raise InputError(f"{what} {index} is out of range: the block has {count}.")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(indices)] = True
    return mask


@contextmanager
def coefficients_changed(
    vit: ViT, layer: Layer, changes: Mapping[int, Change], unseen: bool = False
) -> Iterator[None]:
    """Within the context, ``changes[block]`` is applied to the coefficients of some blocks.

    Maps are refused there, unless the rows that the readout reads are left alone (``unseen``).

    Raises:
        InputError: if there is no such layer or block.
    """
    handles: list[Any] = []
    apart: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    attentions: list[Any] = []
    for block, change in changes.items():
        start = 0
        for owner in _owners(vit, layer, block):
            edit = partial(_edit, owner, change, start)
            start += _width(owner)
            if isinstance(owner.module, nn.MultiheadAttention):
                apart[owner.module] = edit
                attentions.append(owner)
            else:
                handles.append(before(owner.proj.module, unless_paused(partial(_enter, edit))))
    unfolded = _Unfolded(attentions, apart, unseen).active() if apart else nullcontext()
    with nullcontext() if unseen else marked(False), hooks_removed(handles), unfolded:
        yield


def _enter(edit: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: Any) -> Any:
    return (edit(args[0]), *args[1:]), kwargs


def _edit(owner: Attention | MLP, change: Change, start: int, entering: Tensor) -> Tensor:
    """Where a linear layer is shared, only the columns of the module are its coefficients."""
    shared = owner.proj.columns
    if shared is None:
        return change(entering, start)
    first, last, _ = shared.indices(entering.shape[-1])
    own = change(entering[..., first:last], start)
    return torch.cat([entering[..., :first], own, entering[..., last:]], -1)


class _Unfolded(AttentionEdit):
    """``nn.MultiheadAttention`` does not call W_O as a module."""

    changes_weights = False

    def __init__(
        self,
        attentions: Sequence[Attention],
        edits: Mapping[nn.Module, Callable[[Tensor], Tensor]],
        unseen: bool,
    ) -> None:
        super().__init__(attentions)
        self.unseen = unseen
        self._edits = edits

    def entering(self, module: nn.Module, coefficients: Tensor) -> Tensor:
        return self._edits[module](coefficients)
