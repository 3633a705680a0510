"""The steps of models, against block lists written out by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import Tensor, nn

from captum_classemb.dynamics.tracing.feature_maps import as_feature_map
from captum_classemb.dynamics.tracing.traced_steps import find_steps, record_steps
from captum_classemb.errors import InputError, UnsupportedModelError


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def tiny_vit(**kwargs: object) -> nn.Module:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **{**arguments, **kwargs})
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(p, 0.2, 2.0)
    return model


def by_hand(model: nn.Module, x: Tensor, prefix: int) -> list[Tensor]:
    """Embedding, then after attention and after MLP of each block, LayerScale included."""
    tokens = model.patch_embed(x)
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(tokens)))
    stream = [tokens]
    for b in model.blocks:
        tokens = tokens + b.drop_path1(b.ls1(b.attn(b.norm1(tokens))))
        stream.append(tokens)
        tokens = tokens + b.drop_path2(b.ls2(b.mlp(b.norm2(tokens))))
        stream.append(tokens)
    return [t[:, prefix:].transpose(1, 2).unflatten(2, (4, 4)) for t in stream]


@pytest.mark.parametrize(
    ("kwargs", "prefix"),
    [
        ({}, 1),
        ({"init_values": 0.1}, 1),
        ({"reg_tokens": 4}, 5),
        ({"class_token": False, "global_pool": "avg"}, 0),
    ],
)
def test_vit_steps_equal_the_residual_stream(kwargs: dict[str, object], prefix: int) -> None:
    model = tiny_vit(**kwargs).train()
    x = images(32, 3)
    steps = find_steps(model, x)
    assert [s.kind for s in steps] == ["embedding", *["attention", "mlp"] * 3]
    assert [s.block for s in steps] == [-1, 0, 0, 1, 1, 2, 2]
    recorded = record_steps(model, x, steps)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        expected = by_hand(model.eval(), x, prefix)
    for a, b in zip(recorded, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_resnet_steps_are_the_outputs_of_its_blocks() -> None:
    model = timm.create_model("resnet18", num_classes=5).eval()
    x = images(64)
    steps = find_steps(model, x)
    assert [s.kind for s in steps] == [
        "embedding", "convolution", "convolution",
        *["pooling", "convolution"] * 3,
    ]  # fmt: skip
    recorded = record_steps(model, x, steps)
    with torch.no_grad():
        h = model.maxpool(model.act1(model.bn1(model.conv1(x))))
        expected = [h]
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in layer:
                h = block(h)
                expected.append(h)
    for a, b in zip(recorded, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_swin_steps_are_channels_first_and_mark_patch_merging() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, embed_dim=12,
        depths=(2, 2), num_heads=(3, 3), num_classes=5,
    ).eval()  # fmt: skip
    x = images(56)
    steps = find_steps(model, x)
    kinds = [s.kind for s in steps]
    pair = ["attention", "mlp"] * 2
    assert kinds == ["embedding", *pair, "pooling", *pair]
    recorded = record_steps(model, x, steps)
    assert [tuple(m.shape[1:]) for m in recorded] == [(12, 14, 14)] * 5 + [(24, 7, 7)] * 5
    with torch.no_grad():
        last = model.layers(model.patch_embed(x))
    torch.testing.assert_close(recorded[-1], last.permute(0, 3, 1, 2))


FAMILIES = {
    "cait_xxs24_224": {"attention": 24, "mlp": 24},
    "pit_ti_224": {"attention": 12, "mlp": 12, "pooling": 2},
    "convnext_atto": {"convolution": 12, "pooling": 3},
    "xcit_nano_12_p16_224": {"attention": 12, "convolution": 12, "mlp": 12, "block": 2},
    "eva02_tiny_patch14_224": {"attention": 12, "mlp": 12},
    "swinv2_cr_tiny_224": {"attention": 12, "mlp": 12, "pooling": 3},
    "regnetx_002": {"convolution": 9, "pooling": 4},
    "repvgg_a0": {"convolution": 17, "pooling": 4},
    "densenet121": {"convolution": 4, "pooling": 3},
    "vgg11": {"convolution": 3, "pooling": 5},
    "inception_v3": {"convolution": 9, "pooling": 2},
    "resmlp_12_224": {"mlp": 24},
    "levit_128s": {"attention": 9, "mlp": 9, "pooling": 2},
    "mobilevit_s": {"convolution": 3, "pooling": 4, "block": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    model = timm.create_model(name)
    x = images(model.pretrained_cfg["input_size"][-1], 1)
    steps = find_steps(model, x)
    assert steps[0].kind == "embedding"
    assert Counter(s.kind for s in steps[1:]) == FAMILIES[name]
    assert len({s.name for s in steps}) == len(steps)
    for maps in record_steps(model, x, steps):
        assert maps.dim() == 4 and min(maps.shape[-2:]) >= 2


def test_parallel_attention_and_mlp_are_one_step() -> None:
    model = timm.create_model(
        "vit_small_patch16_18x2_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3
    )
    assert [s.kind for s in find_steps(model, images(32))[1:]] == ["attention", "mlp"] * 2


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_branches_are_what_is_added(name: str) -> None:
    """Zeroing a branch leaves the stream as it was before the step."""
    model = timm.create_model(name).eval()
    x = images(64)
    steps = find_steps(model, x)
    modules = dict(model.named_modules())
    tried = 0
    for before, step in zip(steps, steps[1:], strict=False):
        if step.branch is None or tried == 3:
            continue
        handle = modules[step.branch].register_forward_hook(lambda m, a, o: torch.zeros_like(o))
        try:
            was, now = record_steps(model, x, [before, step])
        finally:
            handle.remove()
        if was.shape == now.shape:
            torch.testing.assert_close(was, now)
            tried += 1
    assert tried == 3


def test_hooks_are_gone_after_success_and_failure() -> None:
    model = tiny_vit()
    steps = find_steps(model, images(32))
    record_steps(model, images(32), steps)
    with pytest.raises(AssertionError):  # timm's own check of the size
        record_steps(model, images(40), steps)
    with pytest.raises(AssertionError):
        find_steps(model, images(40))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_what_has_no_spatial_features_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(UnsupportedModelError, match="Sequential has no spatial features"):
        find_steps(flat, images(32))
    with pytest.raises(InputError, match="B×3×H×W"):
        find_steps(flat, torch.zeros(3, 32, 32))


def test_unrolled_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Hiera keeps its tokens unrolled"):
        find_steps(timm.create_model("hiera_tiny_224"), images(224, 1))


def test_feature_maps_of_every_layout() -> None:
    maps = torch.randn(2, 8, 4, 6)
    size = (16, 24)
    tokens = torch.cat([torch.zeros(2, 3, 8), maps.flatten(2).transpose(1, 2)], 1)
    for value in (maps, maps.permute(0, 2, 3, 1), tokens, (torch.zeros(5, 2), tokens)):
        found = as_feature_map(value, 2, size)
        assert found is not None
        torch.testing.assert_close(found, maps)
    square = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(as_feature_map(square, 2, (16, 16)), square)
    last = as_feature_map(square, 2, (16, 16), channels_last=True)
    torch.testing.assert_close(last, square.permute(0, 3, 1, 2))
