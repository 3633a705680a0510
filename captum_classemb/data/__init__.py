"""Photographs and datasets: one reader, one preprocessing, one rule for labels."""

from captum_classemb.data.images import find_images, read_image
from captum_classemb.data.labels import FolderLabels, read_labels
from captum_classemb.data.layouts import LAYOUTS, open_dataset, recognise_layout
from captum_classemb.data.patches import patch_mask
from captum_classemb.data.preprocess import Preprocess, boxes_to_mask, data_config
from captum_classemb.data.sample import CONTEXT, IGNORED, OBJECT, UNLABELLED, Sample, StudyDataset
from captum_classemb.data.scenes import SCENE_CLASSES, Scene, Scenes, render_scene
from captum_classemb.data.splits import TrainAndTest

__all__ = [
    "CONTEXT",
    "FolderLabels",
    "IGNORED",
    "LAYOUTS",
    "OBJECT",
    "Preprocess",
    "SCENE_CLASSES",
    "Sample",
    "Scene",
    "Scenes",
    "StudyDataset",
    "TrainAndTest",
    "UNLABELLED",
    "boxes_to_mask",
    "data_config",
    "find_images",
    "open_dataset",
    "patch_mask",
    "read_image",
    "read_labels",
    "recognise_layout",
    "render_scene",
]
