"""Models: by the names of timm and of the papers, and the one that comes with the package."""

from captum_classemb.models.demo import DEMO_CLASSES, demo_image_paths, demo_mask_paths, demo_vit
from captum_classemb.models.load import load_model
from captum_classemb.models.names import PAPER_MODELS, class_names

__all__ = [
    "DEMO_CLASSES",
    "PAPER_MODELS",
    "class_names",
    "demo_image_paths",
    "demo_mask_paths",
    "demo_vit",
    "load_model",
]
