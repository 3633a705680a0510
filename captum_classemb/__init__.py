"""Vision Transformers explained in class embedding space, with Captum's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_classemb.attr import (
        AllPathImportance,
        ClassEmbeddingGradient,
        ClassEmbeddingProjection,
        LayerClassEmbeddingProjection,
        LayerMemoryContribution,
        MemoryPatchImportance,
        PatchImportance,
    )
    from captum_classemb.vit import zero_shot

__version__ = "0.1.0"

__all__ = [
    "AllPathImportance",
    "ClassEmbeddingGradient",
    "ClassEmbeddingProjection",
    "LayerClassEmbeddingProjection",
    "LayerMemoryContribution",
    "MemoryPatchImportance",
    "PatchImportance",
    "__version__",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that the command line answers before torch is imported.
    if name in __all__:
        from captum_classemb import attr, vit

        return getattr(vit if name == "zero_shot" else attr, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
