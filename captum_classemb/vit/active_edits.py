"""Which edits of a forward pass the calling thread is within; passes that record refuse them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from captum_classemb.errors import InputError

__all__ = [
    "all_patches",
    "edits_paused",
    "marked",
    "patches_taken_out",
    "paused",
    "refuse_edits",
    "table_cuts",
    "tables_cut",
    "unless_paused",
]

_state = threading.local()


@contextmanager
def marked(attention: bool) -> Iterator[None]:
    """Within the context this thread's passes are edited, their attention too if so told."""
    _state.edits = (*editing(), attention)
    try:
        yield
    finally:
        _state.edits = _state.edits[:-1]


@contextmanager
def edits_paused() -> Iterator[None]:
    """Within the context this thread's passes are not edited: the model runs as it is."""
    before, _state.paused = paused(), True
    try:
        yield
    finally:
        _state.paused = before


def paused() -> bool:
    """Whether the edits that this thread is within are paused."""
    return getattr(_state, "paused", False)


def unless_paused(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing while edits are paused."""
    return lambda *call: None if paused() else hook(*call)


@contextmanager
def patches_taken_out(restore: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """Within the context ``restore`` puts scores of the patches left among T, others at 0."""
    before, _state.restore = getattr(_state, "restore", None), restore
    try:
        yield
    finally:
        _state.restore = before


def all_patches(scores: Tensor, count: int) -> Tensor:
    """Scores B×…×K of the patches of a pass as B×…×T: those that an edit took out have none."""
    restore: Callable[[Tensor, int], Tensor] | None = getattr(_state, "restore", None)
    return scores if restore is None else restore(scores, count)


@contextmanager
def tables_cut(cut: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context ``cut`` takes from tables of positions what belongs to tokens left."""
    _state.cuts = (*getattr(_state, "cuts", ()), cut)
    try:
        yield
    finally:
        _state.cuts = _state.cuts[:-1]


def table_cuts() -> tuple[Callable[[Tensor], Tensor], ...]:
    """What the edits that this thread is within do to tables of positions, …×N×N."""
    cuts: tuple[Callable[[Tensor], Tensor], ...] = getattr(_state, "cuts", ())
    return () if paused() else cuts


def editing() -> tuple[bool, ...]:
    """For each edit that this thread is within, whether attention is edited."""
    edits: tuple[bool, ...] = getattr(_state, "edits", ())
    return edits


def refuse_edits(of_attention: bool = False) -> None:
    """Raise InputError within an edit, or within one of attention alone if so told."""
    if any(editing()) or (editing() and not of_attention):
        what = "attention weights are" if of_attention else "attributions are"
        raise InputError(
            f"{what} computed from the model as it is, which an edit of its forward pass changes: "
            "leave the edit first."
        )
