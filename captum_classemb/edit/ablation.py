"""Ablate memories and heads: set what enters W_O or an MLP's last layer to zero or to its mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from captum_classemb.edit.attention_edit import AttentionEdit
from captum_classemb.errors import InputError
from captum_classemb.hooks import before, hooks_removed
from captum_classemb.vit.active_edits import marked
from captum_classemb.vit.parts import MLP, Attention, ViT

Layer = Literal["attn", "mlp"]


class _Part(NamedTuple):
    """Some memories of one module: ``columns`` of what enters the linear layer ``fc``."""

    owner: Attention | MLP
    fc: nn.Module
    columns: Tensor


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
    if layer not in get_args(Layer):
        raise InputError(f"layer {layer!r} is neither 'attn' nor 'mlp'.")
    parts = [
        part
        for block, chosen in memories.items()
        for part in _parts(_owners(vit, layer, block), chosen, "memory", _width)
    ]
    with _ablated(vit, parts, reference):
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
    parts = []
    for block, chosen in heads.items():
        for part in _parts(_owners(vit, "attn", block), chosen, "head", lambda a: a.heads):
            width = _width(part.owner) // part.owner.heads  # type: ignore[union-attr]
            columns = (part.columns[:, None] * width + torch.arange(width)).flatten()
            parts.append(part._replace(columns=columns))
    with _ablated(vit, parts, reference):
        yield


def _owners(vit: ViT, layer: Layer, block: int) -> tuple[Attention, ...] | tuple[MLP, ...]:
    chosen = vit.block(block)
    return chosen.attentions if layer == "attn" else chosen.mlps


def _width(owner: Attention | MLP) -> int:
    """M of one module."""
    return owner.proj.weight.shape[1]


def _parts(
    owners: Sequence[Any], chosen: Sequence[int], what: str, size: Callable[[Any], int]
) -> Iterator[_Part]:
    """Share out indices that are counted through the modules of a block."""
    sizes = [size(owner) for owner in owners]
    for index in chosen:
        if not 0 <= index < sum(sizes):
            raise InputError(f"{what} {index} is out of range: the block has {sum(sizes)}.")
    start = 0
    for owner, own in zip(owners, sizes, strict=True):
        inside = [index - start for index in chosen if start <= index < start + own]
        start += own
        if inside:
            yield _Part(owner, owner.proj.module, torch.tensor(inside))


@contextmanager
def _ablated(vit: ViT, parts: Sequence[_Part], reference: Tensor | None) -> Iterator[None]:
    means: dict[int, Tensor] = {}
    if reference is not None:

        def observe(place: int, entering: Tensor) -> Tensor:
            means[place] = entering[..., _columns(parts[place], entering)].mean(0)
            return entering

        with torch.no_grad(), _entering(parts, observe):
            vit(reference)

    def ablate(place: int, entering: Tensor) -> Tensor:
        columns, mean = _columns(parts[place], entering), means.get(place)
        if mean is not None and mean.shape[:-1] != entering.shape[1:-1]:
            raise InputError(
                f"the mean is that of {len(mean)} tokens, the forward pass has "
                f"{entering.shape[1]}: the images of reference need the size of the others."
            )
        value = torch.zeros_like(entering[..., columns]) if mean is None else mean
        return entering.index_copy(-1, columns, value.expand_as(entering[..., columns]))

    with marked(False), _entering(parts, ablate):
        yield


def _columns(part: _Part, entering: Tensor) -> Tensor:
    shared = part.owner.proj.columns
    start = 0 if shared is None else shared.start
    return part.columns.to(entering.device) + start


@contextmanager
def _entering(parts: Sequence[_Part], edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Within the context, ``edit`` changes what enters the linear layers of the parts."""
    handles = []
    apart: dict[nn.Module, int] = {}
    for place, part in enumerate(parts):
        if isinstance(part.owner.module, nn.MultiheadAttention):
            apart[part.owner.module] = place
            continue

        def enter(args: tuple[Tensor, ...], kwargs: Any, place: int = place) -> Any:
            return (edit(place, args[0]), *args[1:]), kwargs

        handles.append(before(part.fc, enter))
    owners = [parts[place].owner for place in apart.values()]
    unfolded = _Unfolded(owners, lambda module, x: edit(apart[module], x)) if apart else None
    with hooks_removed(handles), nullcontext() if unfolded is None else unfolded.active():
        yield


class _Unfolded(AttentionEdit):
    """``nn.MultiheadAttention`` does not call W_O as a module."""

    changes_weights = False

    def __init__(
        self, attentions: Sequence[Any], edit: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        super().__init__(attentions)
        self._edit = edit

    def entering(self, module: nn.Module, coefficients: Tensor) -> Tensor:
        return self._edit(module, coefficients)
