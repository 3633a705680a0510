"""The packaged model and images: everything can be tried without network and without data."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load
from timm.models.vision_transformer import VisionTransformer

DEMO_CLASSES: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
DEMO_SIZE: Final = 64


def build_demo_vit() -> VisionTransformer:
    """The architecture of the packaged model with random weights, for whoever trains it anew."""
    model = VisionTransformer(
        img_size=DEMO_SIZE,
        patch_size=8,
        embed_dim=96,
        depth=6,
        num_heads=4,
        num_classes=len(DEMO_CLASSES),
    )
    # What timm.data.resolve_model_data_config reads.
    config: dict[str, Any] = {
        "architecture": "captum_classemb_demo_vit",
        "input_size": (3, DEMO_SIZE, DEMO_SIZE),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "num_classes": len(DEMO_CLASSES),
        "label_names": DEMO_CLASSES,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    model.pretrained_cfg = config  # type: ignore[assignment]
    return model


def demo_vit() -> VisionTransformer:
    """A small Vision Transformer that reads handwritten digits in textured scenes.

    6 blocks of width 96 with 4 heads, a CLS token, 8×8 patches of 8×8 pixels; trained on
    `captum_classemb.data.Scenes`. Its classes are `DEMO_CLASSES`; its inputs are 3×64×64,
    normalised with mean and standard deviation 0.5.

    Returns:
        The model, in evaluation mode, on the CPU.
    """
    # What is drawn for weights that are replaced at once is not missed by the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = build_demo_vit()
    weights = files("captum_classemb").joinpath("models", "weights", "demo_vit.safetensors")
    model.load_state_dict(load(weights.read_bytes()))
    return model.eval()


def demo_image_paths() -> list[Path]:
    """The packaged scenes, as PNG files of 64×64 pixels, drawn from the test split."""
    return [path for path in _assets() if not path.stem.endswith("_mask")]


def demo_mask_paths() -> list[Path]:
    """Their objects, in the same order: PNG files that are 255 on the digit and 0 elsewhere."""
    return [path for path in _assets() if path.stem.endswith("_mask")]


def _assets() -> list[Path]:
    folder = files("captum_classemb").joinpath("data", "assets")
    return sorted(Path(str(item)) for item in folder.iterdir() if item.name.endswith(".png"))
