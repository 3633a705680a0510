"""Cut attention between tokens (Vilas et al. §4.2), in a forward pass of an unmodified model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from captum_classemb.edit.attention_edit import AttentionEdit
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.variant import Variant, check_variant
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import Attention


@contextmanager
def knock_out(
    vit: ViT, cut: Tensor, *, renormalise: bool = True, blocks: Sequence[int] | None = None
) -> Iterator[None]:
    """Within the context, queries do not attend to the keys they are cut off from.

    Fused attention stays on where the weights are renormalised. A cut among tokens that are
    removed at the same time goes around the removal: enter ``knock_out`` first.

    Args:
        vit: an adapted model.
        cut: bool, N×N or B×N×N: True where a query (row) is cut off from a key (column), prefix
            tokens first.
        renormalise: cut before the softmax, so that the other weights take over; False sets
            weights to 0 after the softmax and leaves the others as they are.
        blocks: the blocks that are edited; all by default.

    Raises:
        InputError: if ``cut`` has another shape or type, leaves a query nothing to attend to
            though weights are renormalised, or does not fit the tokens of the forward pass.
        UnsupportedModelError: raised by the forward pass if attention of the model's type cannot
            be edited, or if ``cut`` concerns queries that a block of class attention lacks.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt, record
        >>> vit = adapt(demo_vit())
        >>> with knock_out(vit, no_cls(vit, (64, 64))):
        ...     record(vit, torch.rand(1, 3, 64, 64), ["resid_post"])["resid_post"][-1].shape[1]
        65
    """
    if cut.dtype != torch.bool or cut.dim() not in (2, 3) or cut.shape[-1] != cut.shape[-2]:
        raise InputError(
            f"cut has shape {tuple(cut.shape)} and type {cut.dtype}: it holds tokens×tokens or "
            "images×tokens×tokens, bool."
        )
    if renormalise and cut.all(-1).any():
        query = int(cut.all(-1).nonzero()[0, -1])
        raise InputError(
            f"token {query} is cut off from every token, which leaves no weights to renormalise: "
            "leave it one, or give renormalise=False."
        )
    chosen = vit.blocks if blocks is None else [vit.block(index) for index in blocks]
    attentions = [attention for block in chosen for attention in block.attentions]
    with _KnockOut(attentions, cut, renormalise).active():
        yield


class _KnockOut(AttentionEdit):
    def __init__(self, attentions: Iterable[Attention], cut: Tensor, renormalise: bool) -> None:
        super().__init__(attentions)
        self._cut = cut
        self.reweighs = not renormalise

    def visible(self, scores: tuple[int, ...], device: torch.device) -> Tensor | None:
        return None if self.reweighs else ~self._rows(scores, device)

    def weigh(self, weights: Tensor) -> Tensor:
        if not self.reweighs:
            return weights
        return weights.masked_fill(self._rows(weights.shape, weights.device), 0.0)

    def _rows(self, scores: tuple[int, ...], device: torch.device) -> Tensor:
        """The cut at the queries of a module, Q×N or B×1×Q×N."""
        cut = self._cut = self._cut.to(device)
        batch, _, queries, keys = scores
        if cut.shape[-1] != keys or (cut.dim() == 3 and len(cut) != batch):
            raise InputError(
                f"cut has shape {tuple(cut.shape)}: the forward pass has {batch} images of "
                f"{keys} tokens."
            )
        if queries < keys:
            if cut[..., queries:, :].any():
                raise UnsupportedModelError(
                    "patches are cut off from tokens, but in blocks of class attention CLS alone "
                    "asks: there is nothing to cut."
                )
            cut = cut[..., :queries, :]
        return cut[:, None] if cut.dim() == 3 else cut


def self_only(vit: ViT, image_size: tuple[int, int], variant: Variant = "corrected") -> Tensor:
    """A cut between every two image tokens, so that each learns nothing of the others.

    Variants: ``"corrected"`` leaves an image token itself and the prefix tokens; ``"paper"``, as
    the published code does, cuts it off from the prefix tokens too.

    Args:
        vit: an adapted model.
        image_size: H, W.
        variant: ``"corrected"`` or ``"paper"``.

    Returns:
        bool, N×N, for :func:`knock_out` with renormalised weights.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> cut = self_only(adapt(demo_vit()), (64, 64))
        >>> cut.shape, int(cut[1].sum())
        (torch.Size([65, 65]), 63)
    """
    check_variant(variant)
    first, count = vit.prefix_tokens, _tokens(vit, image_size)
    cut = torch.zeros(count, count, dtype=torch.bool)
    cut[first:, 0 if variant == "paper" else first :] = True
    return cut.fill_diagonal_(False)


def no_cls(vit: ViT, image_size: tuple[int, int]) -> Tensor:
    """A cut of every image token from CLS.

    The published code leaves the other weights as they are, which is
    ``knock_out(…, renormalise=False)``.

    Args:
        vit: an adapted model.
        image_size: H, W.

    Returns:
        bool, N×N, for :func:`knock_out`.

    Raises:
        UnsupportedModelError: if the model has no CLS token.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> no_cls(adapt(demo_vit()), (64, 64)).nonzero()[0].tolist()
        [1, 0]
    """
    if not vit.prefix_tokens:
        raise UnsupportedModelError(
            f"{type(vit.model).__qualname__} has no CLS token to cut image tokens off from."
        )
    count = _tokens(vit, image_size)
    cut = torch.zeros(count, count, dtype=torch.bool)
    cut[vit.prefix_tokens :, 0] = True
    return cut


def _tokens(vit: ViT, image_size: tuple[int, int]) -> int:
    h, w = vit.grid(image_size)
    return vit.prefix_tokens + h * w
