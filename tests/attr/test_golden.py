"""What the published code computes on real weights and photographs, reproduced."""

from __future__ import annotations

import copy
import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from oracle import Oracle
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_classemb import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
)
from captum_classemb.functional.identifiability import all_ranks, rank
from captum_classemb.vit import Recording, adapt, record

OBJECTIVES = ("paper", "log_probability", "logit")
SITES = {"hs": "resid_post", "hs-attn": "attn_out", "hs-mlp": "mlp_out"}

#: Another build of torch or timm moves logits by up to this.
NOISE = 1e-3


@dataclass(frozen=True)
class Published:
    """The model, one photograph of each of ten classes, and what the published code says."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    rows: slice
    golden: Any
    recording: Recording


@pytest.fixture(scope="module")
def published(assets: Path) -> Published:
    model = timm.create_model("vit_tiny_patch16_224")
    model.load_state_dict(load_file(assets / "weights/vit_tiny_patch16_224.safetensors"))
    root = assets / "mini_imagenet_s/ImageNetS919/validation"
    with (assets / "mini_imagenet_s/ImageNetS919/validation_stim_info.csv").open() as file:
        known = {row["imagenet_id"]: int(row["index"]) for row in csv.DictReader(file)}
    classes = sorted(known)[:10]
    golden = np.load(assets / "golden/paper_code.npz")
    assert [known[c] for c in classes] == golden["class_index"][:10].tolist()
    pictures = [
        np.asarray(Image.open(sorted((root / c).iterdir())[0]).convert("RGB"), dtype=np.float32)
        for c in classes
    ]
    images = torch.from_numpy(np.stack(pictures) / 255 - 0.5).mul(2).permute(0, 3, 1, 2)
    labels = torch.tensor([known[c] for c in classes])
    recording = record(adapt(model.eval()), images.contiguous(), list(SITES.values()))
    return Published(model, images.contiguous(), labels, slice(0, 50, 5), golden, recording)


def test_predictions(published: Published) -> None:
    right = published.recording.logits.argmax(1) == published.labels
    assert right.tolist() == published.golden["accuracy"][published.rows].astype(bool).tolist()


@pytest.mark.parametrize("block", [0, 3, 7, 11])
@pytest.mark.parametrize("key", SITES)
def test_logits_ranks_and_best_classes(published: Published, key: str, block: int) -> None:
    vit = adapt(published.model)
    with torch.no_grad():
        logits = vit.readout.project(published.recording[SITES[key]][block])
    labels = published.labels[:, None].expand(logits.shape[:2])
    own = logits.gather(-1, labels[..., None])
    expected = published.golden[f"logit/{key}_{block}"][published.rows]
    assert np.abs(own[..., 0].numpy() - expected).max() < NOISE
    apart = ((logits - own).abs() < NOISE).sum(-1) == 1  # no other logit lies close
    assert apart.float().mean() > 0.5
    ranks = torch.from_numpy(published.golden[f"pos/{key}_{block}"][published.rows].astype(int))
    assert torch.equal(rank(logits, labels)[apart], ranks[apart])
    assert torch.equal(all_ranks(logits).gather(-1, labels[..., None])[..., 0][apart], ranks[apart])
    six = logits.topk(6)
    clear = six.values[..., 4] - six.values[..., 5] > NOISE
    top5 = torch.from_numpy(published.golden[f"top5/{key}_{block}"][published.rows].astype(int))
    assert clear.float().mean() > 0.9
    assert torch.equal(six.indices[..., :5].sort(-1)[0][clear], top5.sort(-1)[0][clear])


@pytest.mark.parametrize("block", [0, 11])
@pytest.mark.parametrize("key", SITES)
def test_the_projection_is_these_logits_on_the_grid(
    published: Published, key: str, block: int
) -> None:
    method = ClassEmbeddingProjection(published.model, site=SITES[key], block=block)
    patches = method.attribute_patches(published.images[:4], published.labels[:4])
    expected = published.golden[f"logit/{key}_{block}"][published.rows][:4, 1:]
    assert patches.shape == (4, 1, 14, 14)
    assert np.abs(patches.flatten(1).numpy() - expected).max() < NOISE


def test_the_default_gradient_is_the_published_patch_importance(published: Published) -> None:
    method = ClassEmbeddingGradient(published.model)
    maps = method.attribute_patches(published.images[:6], published.labels[:6]).flatten(3).numpy()
    expected = published.golden["paper_gradient"][..., 1:]
    largest = np.abs(expected).max(axis=(1, 2, 3), keepdims=True)
    assert (np.abs(maps - expected) <= 1e-5 * largest).all()


def test_other_objectives_are_not(published: Published) -> None:
    """The published gradient differs from the one of log p, by about the factor p."""
    expected = published.golden["paper_gradient"][..., 1:]
    method = ClassEmbeddingGradient(published.model, objective="log_probability")
    maps = method.attribute_patches(published.images[:6], published.labels[:6]).flatten(3).numpy()
    assert np.abs(maps - expected).max() > 0.5 * np.abs(expected).max()


# -- Figures on real weights: float32 against the same weights in float64, taken apart eagerly


@pytest.fixture(scope="module")
def in_double(published: Published) -> Oracle:
    return Oracle(copy.deepcopy(published.model).double(), published.images[:2].double())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_closed_form_on_real_weights(
    published: Published, in_double: Oracle, objective: Any
) -> None:
    target = in_double.logits.argmax(1)
    method = ClassEmbeddingGradient(published.model, objective=objective)
    maps = method.attribute_patches(published.images[:2], target).flatten(3)
    expected = in_double.gradient(target, objective)[..., 1:]
    apart = (maps.double() - expected).abs()
    of_image = apart.amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
    within_head = apart.amax(-1) / expected.abs().amax(-1)
    assert float(of_image.max()) <= 1e-5 and float(within_head.max()) <= 1e-4


@pytest.mark.parametrize(
    "method",
    [
        *(partial(ClassEmbeddingGradient, objective=name) for name in OBJECTIVES),
        *(partial(MemoryPatchImportance, objective=name) for name in ("logit", "log_probability")),
    ],
    ids=lambda method: f"{method.func.__name__}-{method.keywords['objective']}",
)
def test_a_thousand_classes_at_once(published: Published, method: Any) -> None:
    attribution, image = method(published.model), published.images[:1]
    together = attribution.attribute_classes(image)
    assert together.shape == (1, 1000, 14, 14)
    some = torch.arange(3, 1000, 111)
    one = attribution.attribute_patches(image.expand(len(some), -1, -1, -1), some).sum((1, 2))
    apart = (together[0, some] - one).abs().amax((1, 2)) / one.abs().amax((1, 2))
    assert float(apart.max()) <= 1e-5


@pytest.mark.parametrize("objective", ["logit", "log_probability"])
def test_the_ledger_on_real_weights(published: Published, objective: Any) -> None:
    method = MemoryPatchImportance(published.model, objective=objective)
    ledger = method.ledger(published.images[:4], published.labels[:4])
    assert bool((ledger.delta.abs() <= 1e-5 * ledger.magnitude).all())
