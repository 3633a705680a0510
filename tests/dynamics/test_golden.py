"""The published Fourier and variance notebooks' output for ViT-Ti/16, on real weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from captum_classemb.dynamics.fourier import FourierAmplitude
from captum_classemb.dynamics.tracing.traced_steps import find_steps, record_steps
from captum_classemb.dynamics.variance import FeatureMapVariance


def photographs(folder: Path, count: int) -> torch.Tensor:
    entries = json.loads((folder / "annotations.json").read_text())
    files = [e["file"] for e in (entries["images"] if isinstance(entries, dict) else entries)]
    pixels = [
        np.asarray(
            Image.open(folder / f).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        )
        for f in files[:count]
    ]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (images - 0.5) / 0.5


def test_paper_variant_equals_the_published_notebooks(assets: Path) -> None:
    golden = np.load(assets / "golden/how_do_vits_work.npz")
    model = timm.create_model("vit_tiny_patch16_224")
    model.load_state_dict(load_file(assets / "weights/vit_tiny_patch16_224.safetensors"))
    images = photographs(assets / "imagenet_val", 40)
    steps = find_steps(model, images)
    assert [s.kind for s in steps] == ["embedding", *["attention", "mlp"] * 12]
    fourier = [FourierAmplitude("paper") for _ in steps]
    variance = [FeatureMapVariance("paper") for _ in steps]
    # Batches of unequal size, as a data set's last one is.
    for batch in images.split(16):
        for maps, f, v in zip(record_steps(model, batch, steps), fourier, variance, strict=True):
            f.update(maps)
            v.update(maps)
    amplitude = torch.stack([f.compute() for f in fourier]).numpy()
    # Where a channel's mean is nearly zero its logarithm is not: the golden file itself is 4e-5
    # from double precision.
    np.testing.assert_allclose(amplitude, golden["relative_log_amplitude"], atol=1e-4)
    spread = torch.stack([v.compute() for v in variance]).numpy()
    np.testing.assert_allclose(spread, golden["variance"], rtol=2e-5)
