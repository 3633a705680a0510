"""Where the papers' code and text differ: which of the two is computed."""

from __future__ import annotations

from typing import Literal

from captum_classemb.errors import InputError

#: ``"paper"`` is what the published code computes.
Variant = Literal["corrected", "paper"]


def check_variant(variant: str) -> None:
    """Raise InputError unless the variant is ``"corrected"`` or ``"paper"``."""
    if variant not in ("corrected", "paper"):
        raise InputError(f"variant {variant!r} is unknown: give 'corrected' or 'paper'.")
