"""The baselines against eager attention and autograd, and against published outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from methods import probe_importance
from torch import Tensor, nn

from captum_classemb.attr.baselines import (
    CPLRP,
    AttentionRollout,
    CheferRelevance,
    LeGrad,
    LibraFullGrad,
    LinearProbeImportance,
    RawAttention,
    TokenOcclusion,
)
from captum_classemb.edit import remove_tokens
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout import LinearProbe
from captum_classemb.vit import adapt, record

ALL = [
    AttentionRollout,
    CPLRP,
    CheferRelevance,
    LeGrad,
    LibraFullGrad,
    RawAttention,
    TokenOcclusion,
]


def build(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"global_pool": "token", **options}
    model: nn.Module = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=5,
        **settings,
    )
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return model.double().eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.tensor([3, 1])


@contextmanager
def eager(model: Any) -> Iterator[list[Tensor]]:
    """Attention maps with their graph, from unfused attention."""
    maps: list[Tensor] = []
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _, __, a: maps.append(a)))
    yield maps
    for handle in handles:
        handle.remove()


def patches(method: Any) -> Tensor:
    images, target = batch()
    scores = method.attribute_patches(images, target)
    assert scores.shape[-2:] == (4, 4) and scores[0].numel() == 16
    return scores.flatten(1)


@pytest.mark.parametrize("registers", [0, 2])
def test_raw_attention_and_rollout(registers: int) -> None:
    model = build(reg_tokens=registers)
    with eager(model) as maps, torch.no_grad():
        model(batch()[0])
    first = 1 + registers
    assert torch.allclose(patches(RawAttention(model)), maps[-1].mean(1)[:, 0, first:])
    rolled = torch.eye(16 + first, dtype=torch.float64)
    for attention in maps:
        rolled = (attention.mean(1) + torch.eye(16 + first, dtype=torch.float64)) / 2 @ rolled
    assert torch.allclose(patches(AttentionRollout(model)), rolled[:, 0, first:])


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "init_values": 0.5, "reg_tokens": 2}])
def test_chefer_relevance(options: dict[str, Any]) -> None:
    model = build(**options)
    images, target = batch()
    with eager(model) as maps:
        score = model(images).gather(1, target[:, None]).sum()
    gradients = torch.autograd.grad(score, maps)
    first = model.num_prefix_tokens
    relevance = torch.eye(16 + first, dtype=torch.float64).expand(2, -1, -1)
    for attention, gradient in zip(maps, gradients, strict=True):
        relevance = relevance + (attention * gradient).clamp(min=0).mean(1) @ relevance
    expected = relevance[:, 0, first:].detach()
    assert torch.allclose(patches(CheferRelevance(model)), expected, rtol=1e-9, atol=1e-12)


def test_chefer_relevance_of_frozen_models() -> None:
    model = build()
    expected = patches(CheferRelevance(model))
    model.requires_grad_(False)
    assert torch.equal(patches(CheferRelevance(model)), expected)


def test_legrad() -> None:
    model = build()
    images, target = batch()
    tokens: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, out: tokens.append(out)) for block in model.blocks
    ]
    with eager(model) as maps:
        model(images)
    for handle in handles:
        handle.remove()
    expected = torch.zeros(2, 17, dtype=torch.float64)
    for attention, hidden in zip(maps, tokens, strict=True):
        score = model.head(model.norm(hidden.mean(1))).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
        expected += gradient.clamp(min=0).mean((1, 2))
    assert torch.allclose(patches(LeGrad(model)), expected[:, 1:], rtol=1e-9, atol=1e-12)


def frozen_forward(model: Any, tokens: Tensor) -> Tensor:
    """The model from its first tokens on, every non-linear factor detached."""

    def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        sigma = (x.square().mean(-1, keepdim=True) + module.eps).sqrt().detach()
        return x / sigma * module.weight + module.bias

    for block in model.blocks:
        x = norm(block.norm1, tokens)
        q, k, v = block.attn.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).detach()
        tokens = tokens + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
        hidden = block.mlp.fc1(norm(block.norm2, tokens))
        ratio = (nn.functional.gelu(hidden) / hidden).detach()
        tokens = tokens + block.mlp.fc2(hidden * ratio)
    logits: Tensor = model.head(norm(model.norm, tokens)[:, 0])
    return logits


def test_cp_lrp_is_gradient_times_input_of_the_frozen_model() -> None:
    model = build()
    images, target = batch()
    tokens = model._pos_embed(model.patch_embed(images)).detach().requires_grad_(True)
    logits = frozen_forward(model, tokens)
    assert torch.allclose(logits, model(images)), "freezing changes no value"
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), tokens)
    expected = (gradient * tokens).sum(-1).detach()[:, 1:]
    assert torch.allclose(patches(CPLRP(model)), expected, rtol=1e-9, atol=1e-12)


def test_cp_lrp_adds_up_to_the_logit_of_a_model_without_biases() -> None:
    model = build(init_values=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    images, target = batch()
    method = CPLRP(model)
    ledger = method.ledger(images, target)
    logits = model(images).gather(1, target[:, None])[:, 0]
    assert torch.allclose(ledger.entries.sum((1, 2)), logits, rtol=1e-9)


def test_occlusion_takes_one_token_out_at_a_time() -> None:
    model = build()
    images, target = batch()
    vit = adapt(model)
    found = patches(TokenOcclusion(model, batch_size=5))
    with torch.no_grad():
        whole = vit(images)
        for gone in (0, 7, 15):
            keep = torch.tensor([[p for p in range(16) if p != gone]] * 2)
            with remove_tokens(vit, keep):
                drop = (whole - vit(images)).gather(1, target[:, None])[:, 0]
            assert torch.allclose(found[:, gone], drop, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ALL)
def test_captum_manners(method: type[Any]) -> None:
    model = build()
    images, target = batch()
    attribution = method(model)
    maps = attribution.attribute(images, target)
    assert maps.shape == images.shape and not maps.requires_grad
    assert isinstance(attribution.attribute((images,), target), tuple)
    summed = attribution.attribute_patches(images, target).flatten(1).sum(1)
    assert torch.allclose(maps.flatten(1).sum(1), summed)
    classes = attribution.attribute_classes(images, [1, 3])
    assert classes.shape == (2, 2, 4, 4)
    alone = attribution.attribute_patches(images, 3).flatten(1, -3).sum(1)
    assert torch.allclose(classes[:, 1], alone, rtol=1e-9, atol=1e-12)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.inference_mode():
        inside = attribution.attribute(images, target)
    assert torch.allclose(inside, maps, rtol=1e-9, atol=1e-12)


def test_linear_probes_rank_the_target_after_every_block() -> None:
    model = build()
    images, target = batch()
    importance = probe_importance(model)
    probe, blocks = importance.readout, range(3)
    with torch.no_grad():
        recording = record(adapt(model), images, ["resid_post"])["resid_post"]
        found = importance.attribute_patches(images, target)
        for b, c in enumerate(target):
            for patch in range(16):
                total = 0.0
                for block in blocks:
                    heads = probe.heads[block, "resid_post"]
                    x = model.norm(recording[block][b, 1 + patch])  # type: ignore[operator]
                    logits = heads.weight[1].double() @ x + heads.bias[1]
                    total += 1 - (sum(float(z) > float(logits[c]) for z in logits)) / 5
                assert found[b, 0].flatten()[patch].item() == pytest.approx(total)
    attention = {(0, "attn_out"): probe.heads[0, "resid_post"]}
    with pytest.raises(InputError, match="no output of a block"):
        LinearProbeImportance(model, LinearProbe(adapt(model).readout, attention, 1))


@pytest.mark.parametrize("method", [AttentionRollout, CheferRelevance, RawAttention])
def test_methods_of_the_class_token_refuse_models_that_read_patches(
    method: type[Any],
) -> None:
    with pytest.raises(UnsupportedModelError, match="reads its patches"):
        method(build(global_pool="avg", class_token=False))


def test_chefer_relevance_of_the_published_code(assets: Path) -> None:
    from PIL import Image
    from safetensors.torch import load_file

    golden = np.load(assets / "golden" / "paper_code.npz")
    model = timm.create_model("vit_tiny_patch16_224")
    model.load_state_dict(load_file(assets / "weights" / "vit_tiny_patch16_224.safetensors"))
    folders = sorted((assets / "mini_imagenet_s").rglob("n*"))
    folders = [folder for folder in folders if folder.is_dir() and any(folder.glob("*.JPEG"))]
    images = []
    for folder in folders[:20]:
        pixels = np.asarray(Image.open(sorted(folder.iterdir())[0]).convert("RGB"), np.float32)
        images.append(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1))
    target = torch.from_numpy(golden["class_index"])
    found = CheferRelevance(model.eval()).attribute_patches(torch.stack(images), target)
    expected = torch.from_numpy(golden["chefer"])
    assert torch.allclose(found.flatten(1), expected, rtol=1e-3, atol=1e-5 * expected.max())
