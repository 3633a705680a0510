"""How Vision Transformers are built: adapters, recording and editing a forward pass."""

from captum_classemb.vit.adapt import adapt, register_adapter, supported_families
from captum_classemb.vit.edit import (
    ablate_heads,
    ablate_memories,
    kept_tokens,
    knock_out,
    no_cls,
    remove_tokens,
    self_only,
)
from captum_classemb.vit.parts import MLP, Attention, Block, Call, ViT, split_heads
from captum_classemb.vit.record import ALL, SITES, Recording, record, record_module
from captum_classemb.vit.verify import identities, verify

__all__ = [
    "ALL",
    "MLP",
    "SITES",
    "Attention",
    "Block",
    "Call",
    "Recording",
    "ViT",
    "ablate_heads",
    "ablate_memories",
    "adapt",
    "identities",
    "kept_tokens",
    "knock_out",
    "no_cls",
    "record",
    "record_module",
    "register_adapter",
    "remove_tokens",
    "self_only",
    "split_heads",
    "supported_families",
    "verify",
]
