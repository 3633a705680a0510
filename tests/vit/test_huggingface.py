"""Hugging Face's families, in both attention implementations, and zero-shot classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_classemb import ClassEmbeddingGradient, MemoryPatchImportance
from captum_classemb.edit import knock_out, remove_tokens
from captum_classemb.errors import InputError
from captum_classemb.readout import ClassEmbedding
from captum_classemb.vit import adapt, identities, record

transformers = pytest.importorskip("transformers")

VISION: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
RELATIVE = {"use_relative_position_bias": True, "use_mean_pooling": True}
SHARED = {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
CLASSIFIERS = [
    ("ViTForImageClassification", "ViTConfig", {}),
    ("ViTMSNForImageClassification", "ViTMSNConfig", {}),
    ("DeiTForImageClassification", "DeiTConfig", {}),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}),
    ("BeitForImageClassification", "BeitConfig", RELATIVE),
    ("BeitForImageClassification", "BeitConfig", SHARED),
    ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}),
    ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
]


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().double()


def classifier(name: str, config: str, options: dict[str, Any], attention: str) -> nn.Module:
    arguments = {**VISION, **options, "num_labels": 7, "attn_implementation": attention}
    if name.startswith("Dinov2"):
        del arguments["intermediate_size"]
    settings = getattr(transformers, config)(**arguments)
    return randomised(getattr(transformers, name)(settings))


def image_encoder(name: str, attention: str) -> nn.Module:
    text = {**VISION, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
    if name == "CLIPVisionModelWithProjection":
        settings = transformers.CLIPVisionConfig(
            **VISION, projection_dim=24, attn_implementation=attention
        )
    elif name == "SiglipVisionModel":
        settings = transformers.SiglipVisionConfig(**VISION, attn_implementation=attention)
    elif name == "CLIPModel":
        settings = transformers.CLIPConfig(
            vision_config=VISION,
            text_config=text,
            projection_dim=24,
            attn_implementation=attention,
        )
    else:
        settings = transformers.SiglipConfig(
            vision_config=VISION, text_config=text, attn_implementation=attention
        )
    return randomised(getattr(transformers, name)(settings))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


# Eager attention of transformers computes its softmax in float32, also in a float64 model.
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-6)])
@pytest.mark.parametrize(("name", "config", "options"), CLASSIFIERS)
def test_classifiers(
    name: str, config: str, options: Any, attention: str, tolerance: float, images: Tensor
) -> None:
    model = classifier(name, config, options, attention)
    vit = adapt(model)
    assert max(identities(vit, images).values()) <= tolerance
    assert torch.equal(vit(images), model(images).logits)
    ledger = MemoryPatchImportance(model).ledger(images, [1, 2])
    assert (ledger.delta.abs() <= tolerance * ledger.magnitude).all()
    gradient = ClassEmbeddingGradient(model)
    every = gradient.attribute_classes(images)
    for target in range(7):
        one = gradient.attribute_patches(images, target).sum((1, 2))
        assert (every[:, target] - one).abs().max() <= 1e-10 * one.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", ["CLIPVisionModelWithProjection", "CLIPModel", "SiglipVisionModel", "SiglipModel"]
)
def test_zero_shot(name: str, attention: str, images: Tensor) -> None:
    model = image_encoder(name, attention)
    vit = adapt(model)
    text = torch.randn(5, vit.num_classes, generator=torch.Generator().manual_seed(2)).double()
    scale, bias = 10.0, -3.0
    readout = ClassEmbedding.from_text_features(vit.readout, text, scale, bias)
    method = MemoryPatchImportance(model, readout=readout)
    ledger = method.ledger(images, target=4)
    embedding = vit(images)
    cosine = nn.functional.cosine_similarity(embedding, text[4], dim=-1)
    assert torch.allclose(ledger.score, scale * cosine + bias, rtol=1e-6)
    assert (ledger.delta.abs() <= 1e-6 * ledger.magnitude).all()
    every = method.attribute_classes(images)
    one = method.attribute_patches(images, target=4).sum((1, 2))
    assert torch.allclose(every[:, 4], one, rtol=1e-9, atol=1e-12)
    gradient = ClassEmbeddingGradient(model, readout=readout, objective="logit")
    assert gradient.attribute(images, target=4).shape == images.shape


def test_the_derivative_of_a_cosine_equals_autograd(images: Tensor) -> None:
    model = image_encoder("CLIPVisionModelWithProjection", "sdpa")
    vit = adapt(model)
    text = torch.randn(5, vit.num_classes).double()
    readout = ClassEmbedding.from_text_features(vit.readout, text, scale=7.0)
    rows = torch.randn(2, 1, 48).double().requires_grad_(True)
    weights = torch.randn(2, 5).double()
    (expected,) = torch.autograd.grad((readout(rows) * weights).sum(), rows)
    assert torch.allclose(readout.pull(rows.detach(), weights), expected, rtol=1e-10, atol=1e-13)


def test_text_features_of_another_width_are_refused() -> None:
    vit = adapt(image_encoder("CLIPVisionModelWithProjection", "sdpa"))
    with pytest.raises(InputError, match=r"C×24 is needed"):
        ClassEmbedding.from_text_features(vit.readout, torch.zeros(5, 23))


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-5)])
@pytest.mark.parametrize("options", [RELATIVE, SHARED, {**RELATIVE, **SHARED}])
def test_removal_cuts_relative_positions_down(
    options: Any, attention: str, tolerance: float, images: Tensor
) -> None:
    vit = adapt(classifier("BeitForImageClassification", "BeitConfig", options, attention))
    keep = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    everyone = torch.ones(17, dtype=torch.bool)
    for image, kept in enumerate(keep):
        pixels, left = images[image, None], everyone.clone()
        left[1:] = kept
        with torch.no_grad(), remove_tokens(vit, keep):
            found = vit(images)[image, None]
        with knock_out(vit, ~left.expand(17, 17)):
            tokens = record(vit, pixels, ["resid_post"])["resid_post"][-1]
        expected = vit.readout(tokens[:, left][:, vit.readout.reads])
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
