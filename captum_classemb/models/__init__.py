"""Models: by the names of timm and of the papers, and the one that comes with the package."""

from captum_classemb.models.demo import (
    DEMO_CLASSES,
    build_demo_vit,
    demo_image_paths,
    demo_mask_paths,
    demo_vit,
)
from captum_classemb.models.load import load_model, read_checkpoint, resolve_device
from captum_classemb.models.names import (
    DEMO_MODEL,
    PAPER_MODELS,
    ClassNames,
    ModelSource,
    class_names,
    find_model,
)

__all__ = [
    "DEMO_CLASSES",
    "DEMO_MODEL",
    "PAPER_MODELS",
    "ClassNames",
    "ModelSource",
    "build_demo_vit",
    "class_names",
    "demo_image_paths",
    "demo_mask_paths",
    "demo_vit",
    "find_model",
    "load_model",
    "read_checkpoint",
    "resolve_device",
]
