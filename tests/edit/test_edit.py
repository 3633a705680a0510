"""Token removal equals hiding the tokens from attention, for every pooling, in float64."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import families
import pytest
import timm
import torch
from masking import logits_without, unfused
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.edit import kept_tokens, remove_tokens
from captum_classemb.edit.tokens import block_calls, keep_tokens, removable_tokens, run_blocks
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit import ViT, adapt, record

#: Names of families whose attention reads positions.
POSITIONS = re.compile("eva|beit|relative")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def _timm(**options: Any) -> nn.Module:
    model: nn.Module = timm.models.VisionTransformer(**SMALL, num_classes=5, **options)
    return model


def _huggingface() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


MODELS = {
    "cls": _timm,
    "mean": lambda: _timm(global_pool="avg", class_token=False),
    "mean with cls": lambda: _timm(global_pool="avg"),
    "registers and layer scale": lambda: _timm(reg_tokens=2, init_values=0.5),
    "torchvision": partial(families.torchvision_vit, 5),
    "hugging face": _huggingface,
}


def build(name: str) -> ViT:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapt(model)


@pytest.fixture(params=list(MODELS))
def vit(request: pytest.FixtureRequest) -> ViT:
    return build(request.param)


def inputs() -> Tensor:
    return torch.randn(
        3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def some_patches() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(16, generator=generator)[:5] for _ in range(3)])


def masked_logits(
    vit: ViT, images: Tensor, keep: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """All tokens run, but none attends to a removed one, and the readout sees the kept ones."""
    visible = torch.zeros(len(images), 16, dtype=torch.bool).scatter_(1, keep, True)
    visible = F.pad(visible, (vit.prefix_tokens, 0), value=True)
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    fused = F.scaled_dot_product_attention

    def hidden(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = mask[:, None, None].expand(-1, 1, q.shape[-2], -1)
        return fused(q, k, v, attn_mask=bias, scale=kwargs.get("scale"))

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", hidden)
        tokens = record(vit, images, ["resid_post"])["resid_post"][-1]
    kept = tokens[visible].unflatten(0, (len(images), -1))
    return vit.readout(kept[:, vit.readout.reads])  # type: ignore[no-any-return]


def test_removal_equals_masking(vit: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    images, keep = inputs(), some_patches()
    expected = masked_logits(vit, images, keep, monkeypatch)
    with torch.no_grad(), remove_tokens(vit, keep):
        removed = vit(images)
    whole = vit(images)
    assert torch.allclose(removed, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(removed, whole, rtol=1e-2), "removal must change the logits"


def test_running_the_blocks_equals_running_the_model(vit: ViT) -> None:
    images, keep = inputs(), some_patches()
    logits, calls = block_calls(vit, images)
    tokens = calls[0].input
    assert torch.allclose(run_blocks(vit, tokens, calls), logits, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), remove_tokens(vit, keep):
        expected = vit(images)
    resumed = run_blocks(vit, keep_tokens(tokens, keep, vit.prefix_tokens), calls)
    assert torch.allclose(resumed, expected, rtol=1e-12, atol=1e-12)


def test_the_order_of_the_kept_patches_does_not_matter(vit: ViT) -> None:
    images, keep = inputs(), some_patches()
    with torch.no_grad(), remove_tokens(vit, keep):
        first = vit(images)
    with torch.no_grad(), remove_tokens(vit, keep.flip(1)):
        assert torch.allclose(vit(images), first, rtol=1e-10, atol=1e-10)


def test_the_model_is_left_as_it_was() -> None:
    vit = build("cls")
    images = inputs()
    before = vit(images)
    with pytest.raises(InputError, match="0 to 15"), remove_tokens(vit, torch.full((3, 2), 16)):
        vit(images)
    assert not any(module._forward_pre_hooks for module in vit.modules())
    assert torch.equal(vit(images), before)


def test_how_many_patches_can_go() -> None:
    counts = {name: removable_tokens(build(name), (32, 32)) for name in MODELS}
    reads_patches = {name for name, count in counts.items() if count == 15}
    assert reads_patches == {"mean", "mean with cls"}
    assert set(counts.values()) == {15, 16}


def test_refusals_say_what_is_wrong() -> None:
    tokens = torch.zeros(2, 17, 4)
    with pytest.raises(InputError, match="2×K patch indices"):
        keep_tokens(tokens, torch.zeros(3, 4, dtype=torch.int64), 1)
    with pytest.raises(InputError, match="2×K patch indices"):
        keep_tokens(tokens, torch.zeros(2, 4), 1)


class _Handed(nn.Module):
    """A block that is handed something beside its tokens."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, other: Any = None) -> Tensor:
        out: Tensor = self.block(tokens)
        return out


def test_what_is_not_known_beside_the_tokens_is_refused() -> None:
    vit = build("cls")
    wrapped = _Handed(vit.blocks[0].module)
    vit.blocks[0].module = wrapped
    tokens = torch.zeros(3, 17, 24, dtype=torch.float64)
    with remove_tokens(vit, some_patches()):
        assert wrapped(tokens).shape == (3, 6, 24)
        with pytest.raises(UnsupportedModelError, match="handed other beside their tokens"):
            wrapped(tokens, other=torch.zeros(16, 8))
        with pytest.raises(UnsupportedModelError, match="handed a tensor beside their tokens"):
            wrapped(tokens, (torch.zeros(16, 8), torch.zeros(16, 8)))


def test_blocks_that_read_positions_are_not_run_on_tokens_alone() -> None:
    vit = adapt(families.build("beit"))
    with pytest.raises(UnsupportedModelError, match="reads positions"):
        run_blocks(vit, torch.zeros(1, 17, 24, dtype=torch.float64), [])


# -- Every family, images of a batch losing different numbers of patches


def uneven(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, three images, and the patches each keeps."""
    model, pixels = families.build(name), families.images(name, batch=3)
    h, w = adapt(model).grid((pixels.shape[2], pixels.shape[3]))
    draws = torch.rand(3, h * w, generator=torch.Generator().manual_seed(5))
    return model, pixels, draws < torch.tensor([[0.2], [0.5], [0.8]])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_uneven_removal_equals_masking(name: str) -> None:
    model, pixels, keep = uneven(name)
    vit = adapt(model)
    if name in families.CLASS_ATTENTION:
        with pytest.raises(UnsupportedModelError, match="Cait"), remove_tokens(vit, keep):
            pass
        return
    expected = logits_without(model, pixels, keep)
    # Eager attention of transformers computes its softmax in float32.
    tolerance = 1e-5 if "eager" in name else 1e-10
    with torch.no_grad(), remove_tokens(vit, keep):
        found = vit(pixels)
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(found, vit(pixels), rtol=1e-2)


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if POSITIONS.search(name)])
def test_equal_removal_equals_masking_where_attention_reads_positions(name: str) -> None:
    for fused in (True, False):
        model, pixels, _ = uneven(name)
        vit = adapt(model if fused else unfused(model))
        keep = some_patches()
        visible = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, keep, True)
        expected = logits_without(families.build(name), pixels, visible)
        with torch.no_grad(), remove_tokens(vit, keep):
            assert torch.allclose(vit(pixels), expected, rtol=1e-10, atol=1e-10)
        everything = torch.arange(16).expand(3, -1)
        with torch.no_grad(), remove_tokens(vit, everything.flip(1)):
            assert torch.allclose(vit(pixels), vit.model(pixels), rtol=1e-12)


def test_what_is_recorded_has_the_rows_of_the_kept_tokens() -> None:
    model, pixels, keep = uneven("registers")
    vit = adapt(model)
    kept = kept_tokens(keep, vit.prefix_tokens)
    with remove_tokens(vit, keep):
        found = record(vit, pixels, ["resid_post"])["resid_post"][-1]
    assert found.shape[:2] == kept.real.shape
    for image in range(3):
        alone = keep[image].nonzero().T
        with remove_tokens(vit, alone):
            expected = record(vit, pixels[image, None], ["resid_post"])["resid_post"][-1][0]
        assert torch.allclose(found[image][kept.real[image]], expected, rtol=1e-12)


def test_uneven_removal_where_the_readout_reads_patches() -> None:
    model, pixels, keep = uneven("mean, no cls")
    vit = adapt(model)
    with pytest.raises(InputError, match="call the adapted model"), remove_tokens(vit, keep):
        model(pixels)
    nothing = keep.clone()
    nothing[1] = False
    with pytest.raises(InputError, match="keeps no patch"), remove_tokens(vit, nothing):
        vit(pixels)
    vit = adapt(families.build("cls"))
    with torch.no_grad(), remove_tokens(vit, torch.zeros(3, 16, dtype=torch.bool)):
        assert vit(families.images("cls", batch=3)).isfinite().all()
    with pytest.raises(InputError, match="3 images of 9 patches"), remove_tokens(vit, keep[:, :9]):
        vit(pixels)
    with pytest.raises(InputError, match="images×patches"), remove_tokens(vit, keep.float()):
        pass
