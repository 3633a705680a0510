"""Attributions in Captum's interface."""

from captum_classemb.attr._base import PatchAttribution
from captum_classemb.attr.all_path import AllPathImportance
from captum_classemb.attr.gradient import ClassEmbeddingGradient
from captum_classemb.attr.layers import LayerClassEmbeddingProjection, LayerMemoryContribution
from captum_classemb.attr.memory import MemoryPatchImportance
from captum_classemb.attr.patch_importance import PatchImportance
from captum_classemb.attr.projection import ClassEmbeddingProjection
from captum_classemb.attr.registry import METHODS, register_method
from captum_classemb.attr.together import attribute_together

__all__ = [
    "METHODS",
    "AllPathImportance",
    "ClassEmbeddingGradient",
    "ClassEmbeddingProjection",
    "LayerClassEmbeddingProjection",
    "LayerMemoryContribution",
    "MemoryPatchImportance",
    "PatchAttribution",
    "PatchImportance",
    "attribute_together",
    "register_method",
]
