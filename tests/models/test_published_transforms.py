"""What the published code does to images, against the libraries it does it with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from captum_classemb.data import Preprocess
from captum_classemb.errors import ModelNameError
from captum_classemb.models.names import PAPER_MODELS, published_transform

#: The settings of the processors that the published code loads, from their configuration files.
VIT = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
DEIT = {
    "size": {"height": 256, "width": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def photograph() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (33, 25, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((250, 330), Image.Resampling.BICUBIC)


def published(name: str, image: Image.Image) -> torch.Tensor:
    transforms = pytest.importorskip("torchvision.transforms")
    if name == "vit_cifar_16":
        steps = [transforms.Resize((224, 224)), transforms.CenterCrop(224), transforms.ToTensor()]
        whole = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)])
        return whole(image)  # type: ignore[no-any-return]
    if name == "vit_miil_16":
        own = timm.create_model("vit_base_patch16_224_miil", depth=1).pretrained_cfg
        config = timm.data.resolve_data_config(own)
        return timm.data.create_transform(**config, is_training=False)(image)  # type: ignore
    transformers = pytest.importorskip("transformers")
    deit = name == "deit_ensemble_16"
    processors: Any = transformers.models
    kind = (
        processors.deit.image_processing_deit.DeiTImageProcessor
        if deit
        else processors.vit.image_processing_vit.ViTImageProcessor
    )
    return kind(**(DEIT if deit else VIT))(image, return_tensors="pt")["pixel_values"][0]  # type: ignore


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_pixels_are_those_of_the_published_code(name: str) -> None:
    architecture = PAPER_MODELS[name].timm_name
    own = timm.get_pretrained_cfg(architecture).to_dict()
    config = {**timm.data.resolve_data_config(pretrained_cfg=own), **published_transform(name)}
    image = photograph()
    found, expected = Preprocess.from_config(config)(image)[0], published(name, image)
    # Processors of some versions resize tensors, and round otherwise: by two levels at most.
    level = 2.5 / 255 / min(config["std"])
    assert found.shape == expected.shape == (3, 224, 224)
    assert float((found - expected).abs().max()) < level
    assert float((found - expected).abs().mean()) < level / 8


def test_other_models_have_none() -> None:
    with pytest.raises(ModelNameError, match="vit_b_32"):
        published_transform("vit_tiny_patch16_224")
