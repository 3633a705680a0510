"""Edit a forward pass of an unmodified model: cut attention, ablate memories, remove tokens."""

from captum_classemb.edit.ablation import ablate_heads, ablate_memories
from captum_classemb.edit.knock_out import knock_out, no_cls, self_only
from captum_classemb.edit.patching import patch_activations
from captum_classemb.edit.registers import sink_neurons, with_register
from captum_classemb.edit.sweep import patching_sweep
from captum_classemb.edit.token_removal import remove_tokens
from captum_classemb.edit.tokens import kept_tokens

__all__ = [
    "ablate_heads",
    "ablate_memories",
    "kept_tokens",
    "knock_out",
    "no_cls",
    "patch_activations",
    "patching_sweep",
    "remove_tokens",
    "self_only",
    "sink_neurons",
    "with_register",
]
