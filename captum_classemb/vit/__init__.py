"""How Vision Transformers are built: adapters, and one recorded forward pass."""

from captum_classemb.vit.adapt import adapt, register_adapter
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Attention, Block, Call, split_heads
from captum_classemb.vit.record import SITES, Recording, record
from captum_classemb.vit.verify import verify
from captum_classemb.vit.zero_shot import zero_shot

__all__ = [
    "MLP",
    "SITES",
    "Attention",
    "Block",
    "Call",
    "Recording",
    "ViT",
    "adapt",
    "record",
    "register_adapter",
    "split_heads",
    "verify",
    "zero_shot",
]
