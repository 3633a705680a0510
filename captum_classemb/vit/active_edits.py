"""Which edits of a forward pass the calling thread is within; passes that record refuse them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from captum_classemb.errors import InputError

__all__ = ["editing", "marked", "refuse_edits", "table_cuts", "tables_cut"]

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
    return cuts


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
