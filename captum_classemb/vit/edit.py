"""Edit a forward pass of an unmodified model: cut attention, ablate memories, remove tokens."""

from __future__ import annotations

from captum_classemb.vit.ablation import ablate_heads, ablate_memories
from captum_classemb.vit.knock_out import knock_out, no_cls, self_only
from captum_classemb.vit.removal import remove_tokens
from captum_classemb.vit.tokens import (
    keep_tokens,
    kept_tokens,
    refuse_class_attention,
    removable_tokens,
    run_blocks,
)

__all__ = [
    "ablate_heads",
    "ablate_memories",
    "keep_tokens",
    "kept_tokens",
    "knock_out",
    "no_cls",
    "refuse_class_attention",
    "removable_tokens",
    "remove_tokens",
    "run_blocks",
    "self_only",
]
