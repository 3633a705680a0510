"""Photographs and datasets: one reader, one preprocessing, one rule for labels."""

from captum_classemb.data.images import read_image
from captum_classemb.data.layouts import LAYOUTS, open_dataset, recognise_layout
from captum_classemb.data.patches import patch_mask
from captum_classemb.data.preprocess import Preprocess, boxes_to_mask, data_config
from captum_classemb.data.sample import CONTEXT, IGNORED, OBJECT, Sample, StudyDataset
from captum_classemb.data.scenes import SCENE_CLASSES, Scene, Scenes, render_scene

__all__ = [
    "CONTEXT",
    "IGNORED",
    "LAYOUTS",
    "OBJECT",
    "Preprocess",
    "SCENE_CLASSES",
    "Sample",
    "Scene",
    "Scenes",
    "StudyDataset",
    "boxes_to_mask",
    "data_config",
    "open_dataset",
    "patch_mask",
    "read_image",
    "recognise_layout",
    "render_scene",
]
