"""Zero-shot classifiers of open_clip and Hugging Face, without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from captum.attr import IntegratedGradients
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
    zero_shot,
)
from captum_classemb.attr import baselines
from captum_classemb.data import Preprocess
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit import adapt
from captum_classemb.vit.verify import identities

NAMES = ["cat", "dog", "bird"]


def randomised(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().double()


def images(size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, size, size, generator=generator).double()


def open_clip_model(**vision: Any) -> Any:
    open_clip = pytest.importorskip("open_clip")
    options = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2}
    text = {"width": 32, "heads": 2, "layers": 1}
    bias = vision.pop("bias", None)
    model = open_clip.CLIP(24, {**options, **vision}, text, init_logit_bias=bias)
    return randomised(model)


def reference(model: Any, pixels: Tensor, templates: tuple[str, ...]) -> Tensor:
    """B×C, a line for each step of open_clip's own zero-shot example."""
    from open_clip import tokenize

    rows = []
    for name in NAMES:
        with torch.no_grad():
            each = model.encode_text(tokenize([t.format(name) for t in templates]), normalize=True)
        rows.append(F.normalize(each.mean(0), dim=-1))
    image = model.encode_image(pixels, normalize=True)
    scores = model.logit_scale.exp() * image @ torch.stack(rows).T
    return scores if model.logit_bias is None else scores + model.logit_bias


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"ls_init_value": 0.1},
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"no_ln_pre": True, "bias": -2.0},
    ],
)
def test_open_clip(vision: dict[str, Any]) -> None:
    model, pixels = open_clip_model(**vision), images()
    assert max(identities(adapt(model.visual), pixels).values()) < 1e-12
    templates = ("a photo of a {}.", "a drawing of a {}.")
    found = zero_shot(model, NAMES, templates=templates)
    expected = reference(model, pixels, templates)
    assert torch.allclose(found(pixels), expected, rtol=1e-10)
    assert found.classes == tuple(NAMES) and found.num_classes == 3
    ledger = MemoryPatchImportance(found).ledger(pixels, 1)
    assert torch.allclose(ledger.score, expected[:, 1], rtol=1e-10)
    assert (ledger.delta.abs() <= 1e-12 * ledger.magnitude).all()
    maps = PatchImportance(found).attribute_classes(pixels)
    assert maps.shape == (2, 3, 4, 4)
    # The text embeddings as a readout of the tower say the same.
    beside = PatchImportance(model, readout=found.readout).attribute_classes(pixels)
    assert torch.allclose(maps, beside, rtol=1e-9, atol=1e-12)
    assert found.readout.text.requires_grad is False


def test_captum_and_the_baselines_take_it() -> None:
    found, pixels = zero_shot(open_clip_model(), NAMES), images()
    integrated = IntegratedGradients(found)
    maps, delta = integrated.attribute(pixels, target=1, n_steps=200, return_convergence_delta=True)
    assert maps.shape == pixels.shape and (delta.abs() < 0.05 * maps.abs().sum((1, 2, 3))).all()
    for name in baselines.__all__:
        if name == "LinearProbeImportance":
            continue
        method = getattr(baselines, name)
        whole = method(found).attribute(pixels, 1)
        beside = method(found.model, readout=found.readout).attribute(pixels, 1)
        assert torch.allclose(whole, beside, rtol=1e-9, atol=1e-12), name


def test_the_gradient_of_attention_is_that_of_the_score() -> None:
    """Chefer's step on one block by autograd through the whole model, heads by hand."""
    found, pixels = zero_shot(open_clip_model(layers=1), NAMES), images()
    block: Any = found.blocks[0].module
    attention = block.attn
    tower: Any = found.model
    x = block.ln_1(tower._embeds(pixels))
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (3, 16)).transpose(1, 2)
        for w, b in zip(
            attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    )
    weights = (q @ k.mT / 4).softmax(-1).detach().requires_grad_(True)
    out = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    tokens = tower._embeds(pixels) + out
    tokens = tokens + block.mlp(block.ln_2(tokens))
    pooled = tower.ln_post(tokens)[:, 0] @ tower.proj
    scores = F.normalize(pooled, dim=-1) @ found.readout.text.T
    (gradient,) = torch.autograd.grad(scores[:, 2].sum(), weights)
    step = (weights * gradient).relu().mean(1)[:, 0, 1:]
    maps = baselines.CheferRelevance(found).attribute_patches(pixels, 2)
    assert torch.allclose(maps.flatten(1), step.detach(), rtol=1e-9)


def test_features_skip_the_text_tower() -> None:
    model, pixels = open_clip_model(), images()
    whole = zero_shot(model, NAMES)
    text = whole.readout.text / whole.readout.text.norm(dim=-1, keepdim=True)
    scale = float(model.logit_scale.exp())
    for found in (
        zero_shot(model, NAMES, features=text),
        zero_shot(model.visual, NAMES, features=7 * text.numpy(), scale=scale),
    ):
        assert torch.allclose(found(pixels), whole(pixels), rtol=1e-10)


def test_refusals() -> None:
    model = open_clip_model()
    text = torch.randn(3, 24)
    for options, sentence in (
        ({"features": text.T}, r"pass `\.T`"),
        ({"features": text[:2]}, "3×24 is needed"),
        ({"templates": "a photo"}, "templates are prompts"),
    ):
        with pytest.raises(InputError, match=sentence):
            zero_shot(model, NAMES, **options)
    with pytest.raises(InputError, match="pass scale="):
        zero_shot(model.visual, NAMES, features=text)
    with pytest.raises(InputError, match="has no text tower: pass features="):
        zero_shot(model.visual, NAMES, scale=1.0)
    with pytest.raises(InputError, match="no class was named"):
        zero_shot(model, [])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("RN50", "ModifiedResNet is a convolutional network"),
        ("convnext_base", "ConvNeXt is a convolutional network"),
        ("coca_ViT-B-32", "CoCa"),
    ],
)
def test_other_towers_are_refused_by_name(name: str, sentence: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    with pytest.raises(UnsupportedModelError, match=sentence):
        adapt(model)


def test_one_class_is_explained_by_its_cosine() -> None:
    model, pixels = open_clip_model(), images()
    one, three = zero_shot(model, ["cat"]), zero_shot(model, NAMES)
    assert torch.allclose(one(pixels)[:, 0], three(pixels)[:, 0], rtol=1e-12)
    expected = PatchImportance(three, objective="logit").attribute(pixels, 0)
    for method in (PatchImportance(one), PatchImportance(one, objective="logit")):
        found = method.attribute(pixels)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    for build in (MemoryPatchImportance, ClassEmbeddingGradient):
        with pytest.raises(InputError, match="more than one class"):
            build(one, objective="log_probability")
    with pytest.raises(InputError, match="more than one class"):
        ClassEmbeddingProjection(one, score="probability")


def siglip_tower() -> Any:
    """As open_clip builds SigLIP's ``visual``: a trunk of timm, and no head."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.timm_model import TimmModel

    del open_clip
    tower = TimmModel("vit_tiny_patch16_224", 192, 224, pool="map", proj="none")
    return randomised(tower)


def test_a_trunk_of_timm() -> None:
    tower, pixels = siglip_tower(), images(224)
    text = torch.randn(3, 192, dtype=torch.float64)
    found = zero_shot(tower, NAMES, features=text, scale=10.0, bias=-3.0)
    expected = 10.0 * F.normalize(tower(pixels), dim=-1) @ F.normalize(text, dim=-1).T - 3.0
    assert torch.allclose(found(pixels), expected, rtol=1e-10)
    ledger = MemoryPatchImportance(found).ledger(pixels, 1)
    assert torch.allclose(ledger.score, expected[:, 1], rtol=1e-9)
    assert (ledger.delta.abs() <= 1e-10 * ledger.magnitude).all()


# -- Hugging Face


def clip_of_hugging_face(folder: Path) -> tuple[Any, Any]:
    """A small CLIPModel saved beside a tokenizer whose vocabulary is written here."""
    transformers = pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz."
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    ids = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = transformers.CLIPConfig(
        vision_config={**sizes, "intermediate_size": 96, "image_size": 32, "patch_size": 8},
        text_config={**sizes, **ids, "intermediate_size": 96, "max_position_embeddings": 32},
        projection_dim=24,
    )
    randomised(transformers.CLIPModel(config)).save_pretrained(folder)
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    return model, tokenizer


def test_clip_of_hugging_face_finds_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = clip_of_hugging_face(tmp_path)
    pixels = images()
    prompts = tokenizer([f"a photo of a {n}." for n in NAMES], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(pixel_values=pixels, **prompts).logits_per_image
        found = zero_shot(model, NAMES)(pixels)
        given = zero_shot(model, NAMES, tokenizer=tokenizer, batch_size=2)(pixels)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert torch.allclose(given, found, rtol=1e-6)


def test_a_tokenizer_that_is_not_there_fails_with_one_line() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 8}, text_config=small
    )
    with pytest.raises(InputError, match="no tokenizer was found beside the model"):
        zero_shot(transformers.CLIPModel(config).eval(), NAMES)


# -- The value site


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}, {"qkv_bias": False}])
def test_the_value_site_is_attention_to_the_token_itself(options: dict[str, Any]) -> None:
    model = randomised(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, **options
        )
    )
    pixels, block = images(), model.blocks[-1]
    entering: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda m, args: entering.append(args[0]))
    model(pixels)
    handle.remove()
    values = block.attn.qkv(block.norm1(entering[0]))[..., 96:]
    tokens = model.norm(block.ls1(block.attn.proj(values)))
    expected = model.head(tokens)[:, 1:, 3].unflatten(1, (4, 4))
    projection = ClassEmbeddingProjection(model, site="value")
    assert torch.allclose(projection.attribute_patches(pixels, 3)[:, 0], expected, rtol=1e-10)
    assert torch.allclose(projection.attribute_classes(pixels)[:, 3], expected, rtol=1e-10)


def test_the_value_site_of_every_tower() -> None:
    for model in (open_clip_model(), open_clip_model(ls_init_value=0.2)):
        found, pixels = zero_shot(model, NAMES), images()
        tower = model.visual
        block = tower.transformer.resblocks[-1]
        x = tower._embeds(pixels)
        for earlier in tower.transformer.resblocks[:-1]:
            x = earlier(x)
        weight, bias = block.attn.in_proj_weight[96:], block.attn.in_proj_bias[96:]
        values = F.linear(block.ln_1(x), weight, bias)
        tokens = tower.ln_post(block.ls_1(block.attn.out_proj(values))) @ tower.proj
        expected = F.normalize(tokens, dim=-1)[:, 1:] @ found.readout.text.T
        maps = ClassEmbeddingProjection(found, site="value").attribute_classes(pixels)
        assert torch.allclose(maps.flatten(2).mT, expected, rtol=1e-9)


# -- The real tower


def real_clip(assets: Path) -> Any:
    from safetensors.torch import load_file

    packed = load_file(assets / "weights" / "clip_vit_base_patch16.int8.safetensors")
    state = {}
    for name, tensor in packed.items():
        if name.endswith(".int8"):
            plain = name.removesuffix(".int8")
            scale = packed[f"{plain}.scale"].float()
            state[plain] = tensor.float() * scale.view(-1, *(1,) * (tensor.dim() - 1))
        elif not name.endswith(".scale"):
            state[name] = tensor.float()
    model = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=512)
    model.load_state_dict({**state, "head.bias": torch.zeros(512)})
    return model.eval()


def renamed(tower: Any) -> Any:
    """The same weights in open_clip's ``visual``."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    visual = VisionTransformer(224, 16, 768, 12, 12, 4.0, output_dim=512, act_layer=QuickGELU)
    own = tower.state_dict()
    state = {
        "class_embedding": own["cls_token"][0, 0],
        "positional_embedding": own["pos_embed"][0],
        "conv1.weight": own["patch_embed.proj.weight"],
        "proj": own["head.weight"].T,
    }
    for there, here in (("ln_pre", "norm_pre"), ("ln_post", "norm")):
        state |= {f"{there}.{kind}": own[f"{here}.{kind}"] for kind in ("weight", "bias")}
    parts = {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for block in range(12):
        to, of = f"transformer.resblocks.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            state[f"{to}.attn.in_proj_{kind}"] = own[f"{of}.attn.qkv.{kind}"]
            state |= {f"{to}.{a}.{kind}": own[f"{of}.{b}.{kind}"] for a, b in parts.items()}
    visual.load_state_dict(state)
    return visual.eval()


def test_the_real_clip_is_the_same_in_both_libraries() -> None:
    pytest.importorskip("open_clip")
    folder = os.environ.get("CLASSEMB_TEST_ASSETS")
    if not folder:
        pytest.skip("CLASSEMB_TEST_ASSETS is unset: it names a folder with real weights")
    assets = Path(folder)
    with np.load(assets / "weights" / "clip_vit_base_patch16_voc20.npz") as file:
        text, names = torch.from_numpy(file["text"]), [str(name) for name in file["names"]]
    tower = real_clip(assets)
    photo = Image.open(sorted((assets / "imagenet_val").glob("*.JPEG"))[0])
    pixels = Preprocess.of_model(tower, "squash")(photo)[0][None]
    one, other = (
        zero_shot(model, names, features=text, scale=100.0) for model in (tower, renamed(tower))
    )
    assert torch.allclose(one(pixels), other(pixels), atol=1e-4)
    for method in (PatchImportance, MemoryPatchImportance):
        maps, same = (method(model).attribute_classes(pixels, [2, 7]) for model in (one, other))
        assert (maps - same).abs().max() < 1e-3 * maps.abs().max()
