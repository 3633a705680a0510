"""Datasets with object masks, and the images that come with the package."""

from captum_classemb.data.layouts import LAYOUTS, open_dataset, recognise_layout
from captum_classemb.data.patches import patch_mask
from captum_classemb.data.sample import CONTEXT, IGNORED, OBJECT, Sample, StudyDataset
from captum_classemb.data.scenes import SCENE_CLASSES, Scene, Scenes, render_scene
from captum_classemb.data.splits import TrainAndTest
from captum_classemb.data.transforms import PairedTransform, boxes_to_mask, data_config

__all__ = [
    "CONTEXT",
    "IGNORED",
    "LAYOUTS",
    "OBJECT",
    "PairedTransform",
    "SCENE_CLASSES",
    "Sample",
    "Scene",
    "Scenes",
    "StudyDataset",
    "TrainAndTest",
    "boxes_to_mask",
    "data_config",
    "open_dataset",
    "patch_mask",
    "recognise_layout",
    "render_scene",
]
