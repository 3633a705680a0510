"""Run the model as if some patches had never been there.

Patches are dropped after position embeddings are added, so that the others stay where they are.
Where attention reads positions itself, rotary embeddings and tables of relative positions are cut
down to the patches that are left. Images of a batch that lose more patches than others are filled
up with tokens that nobody attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from captum_classemb.edit.attention_edit import AttentionEdit
from captum_classemb.edit.tokens import (
    Kept,
    keep_tokens,
    kept_tokens,
    reads_patches,
    refuse_class_attention,
)
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.hooks import after, before, hooks_removed
from captum_classemb.vit.active_edits import patches_taken_out, tables_cut, unless_paused
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import Call


@contextmanager
def remove_tokens(vit: ViT, keep: Tensor) -> Iterator[None]:
    """Within the context the model sees, of each image's patches, only those in ``keep``.

    Maps within the context are of the patches that are left, and 0 elsewhere, where all images of
    the batch keep equally many. What is recorded has the rows of :func:`kept_tokens`. Call the
    adapted model: where its readout reads patches and images keep different numbers of them, the
    model it holds would read the tokens that fill them up, and is refused.

    Args:
        vit: an adapted model.
        keep: the patches to keep, counted row by row without prefix tokens: bool, B×(h·w), each
            image keeping any number of them, or their indices, int64, B×K.

    Raises:
        UnsupportedModelError: if tokens cannot be taken out of this model exactly; raised here or
            by the forward pass.
        InputError: raised by the forward pass if ``keep`` does not fit the images.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> vit = adapt(demo_vit())
        >>> with remove_tokens(vit, torch.rand(2, 64) > 0.5):
        ...     vit(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    refuse_class_attention(vit)
    removal = _Removal(vit, kept_tokens(keep, vit.prefix_tokens), keep.shape[1], keep.dtype)
    attention = removal.active() if removal.edits_attention else nullcontext()
    restored = patches_taken_out(removal.restore)
    with attention, tables_cut(removal.cut), restored, hooks_removed(removal.hooks()):
        yield


class _Removal(AttentionEdit):
    """One removal: hooks that drop tokens, and what attention has to know of it."""

    def __init__(self, vit: ViT, kept: Kept, width: int, dtype: torch.dtype) -> None:
        self.vit, self.kept = vit, kept
        self.patches = width if dtype == torch.bool else None
        self.padded = not bool(kept.real.all())
        #: Tables that attention holds itself cannot be cut down on the way to it.
        self.own_tables = [
            attention
            for block in vit.blocks
            for attention in block.attentions
            if attention.bias(Call((), {}), slice(0, 1)) is not None
        ]
        #: Tables that are cut down are read as they are left; who hides tokens changes weights.
        self.changes_weights, self.unseen = self.padded, not self.padded
        self.edits_attention = self.padded or bool(self.own_tables)
        everywhere = [a for block in vit.blocks for a in block.attentions]
        super().__init__(everywhere if self.padded else self.own_tables)
        self._tokens = 0
        self._through_vit = False
        self._final: Tensor | None = None

    # -- In attention

    def visible(self, scores: tuple[int, ...], device: torch.device) -> Tensor | None:
        return self.kept.real[:, None, None].to(device) if self.padded else None

    def positions(self, bias: Tensor, scores: tuple[int, ...]) -> Tensor:
        left = self.kept.places.shape[1]
        # Two tables may be added before they are added to dot products.
        dots = scores[0] == len(self.kept.places) and tuple(scores[-2:]) == (left, left)
        return self.cut(bias) if dots else bias

    def cut(self, table: Tensor) -> Tensor:
        """A table of positions of all tokens (N×N) for the tokens that are left."""
        return self._table(table) if self._is_table(table) else table

    def restore(self, scores: Tensor, count: int) -> Tensor:
        """Scores B×…×K of the patches that are left, in their places among all: B×…×T."""
        prefix = self.vit.prefix_tokens
        index = (self.kept.places[:, prefix:] - prefix).to(scores.device)
        index = index.view(len(index), *[1] * (scores.dim() - 2), -1)
        whole = scores.new_zeros(*scores.shape[:-1], count)
        return whole.scatter(-1, index.expand(scores.shape), scores)

    def _is_table(self, tensor: Tensor) -> bool:
        """Whether it has a row and a column for each token, none removed."""
        return tensor.dim() > 2 and tuple(tensor.shape[-2:]) == (self._tokens, self._tokens)

    def _table(self, table: Tensor) -> Tensor:
        """(B×)H×N×N to B×H×(P+K)×(P+K)."""
        index = self.kept.places.to(table.device)
        rows = _rows(table, index)
        return _rows(rows.transpose(-2, -1), index).transpose(-2, -1)

    # -- On the way to it

    def hooks(self) -> list[Any]:
        """Set the hooks."""
        blocks = self.vit.blocks
        handles = [before(blocks[0].module, unless_paused(self._drop))]
        handles += [before(b.module, unless_paused(self._cut_positions)) for b in blocks]
        apart = [
            attention.module
            for block in blocks
            for attention in block.attentions
            if attention.module is not block.module and attention not in self.own_tables
        ]
        handles += [before(module, unless_paused(self._cut_tables)) for module in apart]
        if self.padded and reads_patches(self.vit):
            handles.append(before(self.vit, unless_paused(self._begin)))
            handles.append(after(blocks[-1].module, unless_paused(self._keep_final)))
            handles.append(after(self.vit, unless_paused(self._read)))
        return handles

    def _drop(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = Call(args, kwargs).argument(0)
        patches = tokens.shape[1] - self.vit.prefix_tokens
        index, real = self.kept
        if len(index) != len(tokens) or self.patches not in (None, patches):
            raise InputError(
                f"keep is for {len(index)} images of {self.patches or 'any number of'} patches: "
                f"the forward pass has {len(tokens)} of {patches}."
            )
        self._check_enough(real)
        self._tokens, self._through_vit = tokens.shape[1], False
        chosen = index[:, self.vit.prefix_tokens :] - self.vit.prefix_tokens
        kept = keep_tokens(tokens, chosen, self.vit.prefix_tokens)
        if args:
            return (kept, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): kept}

    def _check_enough(self, real: Tensor) -> None:
        if not reads_patches(self.vit):
            return
        if not real[:, self.vit.prefix_tokens :].any(1).all():
            raise InputError(
                "an image keeps no patch, but the model's readout reads patches: leave it one."
            )
        if self.padded and not self._through_vit:
            raise InputError(
                "images keep different numbers of patches, which the model's readout would "
                "average: call the adapted model instead of the model it holds."
            )

    def _cut_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Rotary embeddings come to a block beside its tokens, and so do shared tables."""

        def cut(name: str, value: Any) -> Any:
            if isinstance(value, Tensor) and not self._is_table(value):
                if name != "rope" or value.shape[-2] != self._tokens - self.vit.prefix_tokens:
                    raise self._unknown(name)
                return _rotary(
                    value, self.kept.places[:, self.vit.prefix_tokens :] - self.vit.prefix_tokens
                )
            if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
                raise self._unknown(name)
            return value

        return _beside_tokens(args, kwargs, cut)

    def _cut_tables(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def cut(name: str, value: Any) -> Any:
            return self.cut(value) if isinstance(value, Tensor) else value

        return _beside_tokens(args, kwargs, cut)

    def _unknown(self, name: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"blocks of {type(self.vit.model).__qualname__} are handed {name or 'a tensor'} beside "
            "their tokens, of which it is not known how it belongs to them: tokens cannot be taken "
            "out exactly; perturb pixels instead."
        )

    # -- Where the readout reads patches, and images keep different numbers of them

    def _begin(self, args: Any, kwargs: Any) -> None:
        self._through_vit = True

    def _keep_final(self, args: Any, kwargs: Any, output: Any) -> None:
        self._final = output[0] if isinstance(output, tuple) else output

    def _read(self, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        final, self._final = self._final, None
        assert final is not None
        logits = torch.empty_like(output)
        readout, counts = self.vit.readout, self.kept.real.sum(1).to(output.device)
        for count in counts.unique().tolist():
            chosen = counts == count
            read = readout(final[chosen, :count][:, readout.reads])
            logits[chosen] = read.to(logits.dtype)
        return logits


def _beside_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[str, Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change what a module is called with, except for its first argument."""
    tokens = min(len(args), 1)
    positional = tuple(change("", value) for value in args[1:])
    named = {
        name: value if place < 1 - tokens else change(name, value)
        for place, (name, value) in enumerate(kwargs.items())
    }
    return (*args[:1], *positional), named


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Some rows of each image of a table (B×)H×N×M: B×H×K×M."""
    if table.dim() == 3:
        table = table[None]
    table = table.expand(len(index), -1, -1, -1)
    return table.gather(2, index[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))


def _rotary(rope: Tensor, patches: Tensor) -> Tensor:
    """Rotary embeddings of some patches: B×(H or 1)×K×E, of T×E, H×T×E or B×H×T×E."""
    return _rows(rope[None] if rope.dim() == 2 else rope, patches.to(rope.device))
