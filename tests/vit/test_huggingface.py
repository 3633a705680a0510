"""Hugging Face's families, in both attention implementations, and zero-shot classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from readout.test_probe import check_derivatives
from torch import Tensor, nn

from captum_classemb import ClassEmbeddingGradient, MemoryPatchImportance, PatchImportance
from captum_classemb.edit import knock_out, remove_tokens
from captum_classemb.errors import InputError
from captum_classemb.readout import ClassEmbedding
from captum_classemb.vit import adapt, record
from captum_classemb.vit.verify import identities

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
ONLY_SHARED = {"use_relative_position_bias": False}
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
    ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}),
    ("IJepaForImageClassification", "IJepaConfig", {}),
    ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", RELATIVE),
    ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", {**SHARED, **ONLY_SHARED}),
    ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", {**SHARED, **RELATIVE}),
    ("CLIPForImageClassification", "CLIPConfig", {}),
    ("SiglipForImageClassification", "SiglipConfig", {}),
    ("Siglip2ForImageClassification", "Siglip2Config", {"num_patches": 16}),
]
ENCODERS = [
    ("ViTModel", "ViTConfig", {}, 1),
    ("DeiTModel", "DeiTConfig", {}, 2),
    ("BeitModel", "BeitConfig", RELATIVE, 1),
    ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}, 1),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}, 5),
    ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2}, 3),
    ("DINOv3ViTModel", "DINOv3ViTConfig", {"use_gated_mlp": True, "key_bias": True}, 1),
    ("IJepaModel", "IJepaConfig", {}, 0),
    ("CLIPVisionModel", "CLIPVisionConfig", {}, 1),
]


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().double()


def classifier(name: str, config: str, options: dict[str, Any], attention: str) -> nn.Module:
    arguments = {**VISION, **options}
    if name.startswith("Dinov2"):
        del arguments["intermediate_size"]
    if config in ("CLIPConfig", "SiglipConfig", "Siglip2Config"):
        arguments = {"vision_config": arguments}
    settings = getattr(transformers, config)(
        **arguments, num_labels=7, attn_implementation=attention
    )
    return randomised(getattr(transformers, name)(settings))


def called(model: nn.Module, images: Tensor) -> Any:
    """The model's own call, of SigLIP 2 on patches row by row, (row, column, channel) each."""
    if not type(model).__name__.startswith("Siglip2"):
        return model(images)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8)  # B×3×h×w×8×8
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(len(images), 16, -1)
    shapes = torch.tensor([[4, 4]] * len(images))
    return model(patches, pixel_attention_mask=torch.ones(2, 16), spatial_shapes=shapes)


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
    assert torch.allclose(vit(images), called(model, images).logits, rtol=1e-12)
    ledger = MemoryPatchImportance(model).ledger(images, [1, 2])
    assert (ledger.delta.abs() <= tolerance * ledger.magnitude).all()
    gradient = ClassEmbeddingGradient(model)
    every = gradient.attribute_classes(images)
    for target in range(7):
        one = gradient.attribute_patches(images, target).sum((1, 2))
        assert (every[:, target] - one).abs().max() <= 1e-10 * one.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "config", "options", "prefix"), ENCODERS)
def test_encoders_are_read_with_a_head(
    name: str, config: str, options: Any, prefix: int, attention: str, images: Tensor
) -> None:
    model = classifier(name, config, options, attention)
    assert adapt(model).prefix_tokens == prefix
    assert max(identities(adapt(model), images).values()) <= 1e-6
    widths = {1: {0: lambda t: t.mean(1)}.get(prefix, lambda t: t[:, 0])}
    if config == "BeitConfig":  # mean pooling has its norm after the mean
        widths = {1: lambda t: model.pooler(t)}  # type: ignore[operator]
    if config == "CLIPVisionConfig":
        widths[1] = lambda t: model.post_layernorm(t[:, 0])  # type: ignore[operator]
    elif prefix:
        widths[2] = lambda t: torch.cat([t[:, 0], t[:, prefix:].mean(1)], -1)
    for width, pool in widths.items():
        if width == 2 and config == "BeitConfig":
            continue
        head = nn.Linear(48 * width, 7).double()
        last = model(images).last_hidden_state
        expected = head(pool(last)) if last is not None else None
        ledger = MemoryPatchImportance(model, readout=head).ledger(images, 3)
        assert torch.allclose(ledger.score, expected[:, 3], rtol=1e-9)
        assert (ledger.delta.abs() <= 1e-6 * ledger.magnitude).all()
        for method in (PatchImportance, ClassEmbeddingGradient):
            maps = method(model, readout=head).attribute_classes(images, [3])
            assert maps.shape == (2, 1, 4, 4) and maps.isfinite().all()


@pytest.mark.parametrize("options", [(None, True), {"interpolate_pos_encoding": True}])
def test_positions_are_interpolated_where_the_model_is_told_so(options: Any) -> None:
    model = classifier("ViTForImageClassification", "ViTConfig", {}, "sdpa")
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    with pytest.raises(InputError, match="the model takes 32×32"):
        PatchImportance(model).attribute(images, 3)
    method = PatchImportance(model)
    one = method.attribute(images, 3, additional_forward_args=options)
    every = method.attribute_classes(images, additional_forward_args=options)
    assert one.shape == images.shape and every.shape == (2, 7, 5, 3)
    shared = every[:, 3].repeat_interleave(8, 1).repeat_interleave(8, 2) / 192
    assert torch.allclose(one, shared[:, None].expand_as(one), rtol=1e-9)

    class Interpolating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x, interpolate_pos_encoding=True).logits
            return y

    assert torch.allclose(PatchImportance(Interpolating()).attribute(images, 3), one, rtol=1e-9)


def test_padded_input_of_siglip_2_is_refused() -> None:
    model = classifier(
        "Siglip2ForImageClassification", "Siglip2Config", {"num_patches": 16}, "sdpa"
    )
    with pytest.raises(InputError, match="a batch of images"):
        PatchImportance(model).attribute(torch.zeros(2, 16, 192), 1)


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
    check_derivatives(readout, torch.randn(2, 1, 48).double())


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


class Around(nn.Module):
    """An encoder with a head of the user's own, reading one thing of its output."""

    def __init__(self, encoder: nn.Module, head: nn.Module, read: Any) -> None:
        super().__init__()
        self.encoder, self.head, self.read = encoder, head, read

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.read(self.encoder(pixel_values=x)))
        return y


def encoder(name: str = "ViTModel", config: str = "ViTConfig", **options: Any) -> nn.Module:
    return classifier(name, config, options, "sdpa")


def timm_wrapper() -> nn.Module:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=small, num_labels=7
    )
    return transformers.TimmWrapperForImageClassification(config)  # type: ignore[no-any-return]


def another_head() -> nn.Module:
    model: Any = encoder("ViTForImageClassification")
    model.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(48, 7))
    return model  # type: ignore[no-any-return]


AROUND: dict[str, Any] = {
    "timm's wrapper": timm_wrapper,
    "another head": another_head,
    "CLS": lambda: Around(encoder(), nn.Linear(48, 7), lambda o: o.last_hidden_state[:, 0]),
    "tanh pooler": lambda: Around(encoder(), nn.Linear(48, 7), lambda o: o.pooler_output),
    "logits": lambda: Around(
        encoder("ViTForImageClassification"), nn.Identity(), lambda o: o.logits
    ),
    "DINOv2": lambda: Around(
        encoder("Dinov2Model", "Dinov2Config", mlp_ratio=2),
        nn.Linear(96, 7),
        lambda o: torch.cat([o.last_hidden_state[:, 0], o.last_hidden_state[:, 1:].mean(1)], -1),
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_models_around_hugging_faces(name: str, images: Tensor) -> None:
    model = randomised(AROUND[name]())
    vit = adapt(model)
    with torch.no_grad():
        output = model(images)
        expected = output if isinstance(output, Tensor) else output.logits
        assert torch.equal(vit(images), expected)
    assert max(identities(vit, images).values()) <= 1e-10
    every = PatchImportance(model).attribute_classes(images)
    one = PatchImportance(model).attribute_patches(images, 3).sum((1, 2))
    assert torch.allclose(every[:, 3], one, rtol=1e-9, atol=1e-12)
