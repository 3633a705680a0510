"""Cutting attention and ablating memories equals brute force, for every family, in float64."""

from __future__ import annotations

import threading

import pytest
import torch
from anatomy import anatomy
from families import CLASS_ATTENTION, FAMILIES, build, images
from masking import edited_logits, logits_without, unfused, without_columns
from torch import Tensor, nn

from captum_classemb import PatchImportance
from captum_classemb.edit import (
    ablate_heads,
    ablate_memories,
    kept_tokens,
    knock_out,
    no_cls,
    remove_tokens,
    self_only,
)
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit import ViT, adapt, record

TIMM = [name for name in FAMILIES if not name.startswith(("torchvision", "hugging"))]


def close(found: Tensor, expected: Tensor, name: str) -> bool:
    # Eager attention of transformers computes its softmax in float32.
    tolerance = 1e-5 if "eager" in name else 1e-10
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def some_cut(name: str, vit: ViT, pixels: Tensor) -> Tensor:
    h, w = vit.grid((pixels.shape[2], pixels.shape[3]))
    count = vit.prefix_tokens + h * w
    generator = torch.Generator().manual_seed(3)
    cut = torch.rand(len(pixels), count, count, generator=generator) < 0.4
    if name in CLASS_ATTENTION:
        cut[:, 1:] = False
    return cut & ~torch.eye(count, dtype=torch.bool)


def attend(cut: Tensor, renormalise: bool):  # type: ignore[no-untyped-def]
    def weigh(scores: Tensor) -> Tensor:
        hidden = cut[:, None, : scores.shape[2]]
        if renormalise:
            return scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return scores.softmax(-1).masked_fill(hidden, 0.0)

    return weigh


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_equals_explicit_attention(name: str, renormalise: bool) -> None:
    model, pixels = build(name), images(name)
    vit = adapt(model)
    cut = some_cut(name, vit, pixels)
    expected = edited_logits(model, pixels, attend(cut, renormalise))
    with torch.no_grad():
        whole = vit(pixels)
        with knock_out(vit, cut, renormalise=renormalise):
            found = vit(pixels)
        assert close(found, expected, name)
        assert not torch.allclose(found, whole, rtol=1e-3)
        assert torch.equal(vit(pixels), whole)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("name", TIMM)
def test_fused_and_eager_attention_are_cut_alike(name: str, renormalise: bool) -> None:
    pixels = images(name)
    found = []
    for model in (build(name), unfused(build(name))):
        vit = adapt(model)
        cut = some_cut(name, vit, pixels)
        with torch.no_grad(), knock_out(vit, cut, renormalise=renormalise, blocks=[1]):
            found.append(vit(pixels))
    assert torch.allclose(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", ["attn", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ablation_equals_weights_of_zero(name: str, layer: str) -> None:
    model, pixels = build(name), images(name)
    vit = adapt(model)
    part = anatomy(model).layers[1]
    owners = vit.blocks[1].attentions if layer == "attn" else vit.blocks[1].mlps
    width = sum(owner.proj.weight.shape[1] for owner in owners)
    chosen = [0, 5, width - 1]
    with torch.no_grad(), ablate_memories(vit, layer, {1: chosen}):  # type: ignore[arg-type]
        found = vit(pixels)
    with torch.no_grad():
        expected = adapt(without_columns(model, layer, 1, chosen))(pixels)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
        assert not torch.equal(found, vit(pixels))
        if layer == "mlp":
            return
        heads = sum(attention.heads for attention in vit.blocks[1].attentions)
        assert heads == 3 * len(part.attentions)
        size = width // heads
        columns = [*range(size), *range((heads - 1) * size, width)]
        with ablate_heads(vit, {-2: [0, heads - 1]}):
            found = vit(pixels)
        expected = adapt(without_columns(model, layer, 1, columns))(pixels)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["registers", "torchvision", "differential", "parallel scaling"])
def test_ablation_to_the_mean(name: str) -> None:
    model, pixels = build(name), images(name, batch=3)
    vit = adapt(model)
    with torch.no_grad():
        whole = vit(pixels)
        # What all images share changes nothing.
        with ablate_heads(vit, {0: [0, 2]}, reference=pixels[:1]):
            assert torch.allclose(vit(pixels[:1]), whole[:1], rtol=1e-10)
        with ablate_heads(vit, {0: [0, 1, 2]}, reference=pixels):
            assert not torch.allclose(vit(pixels), whole, rtol=1e-3)
    if name == "torchvision":
        return
    before = record(vit, pixels, ["attn_coefficients"])["attn_coefficients"][0][0]
    with ablate_memories(vit, "attn", {0: [1, 4]}, reference=pixels):
        inside = record(vit, pixels, ["attn_coefficients"])["attn_coefficients"][0][0]
    expected = before.clone()
    expected[..., [1, 4]] = before.mean(0)[..., [1, 4]]
    assert torch.allclose(inside, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["cls", "torchvision", "beit", "hugging face, sdpa"])
def test_edits_within_edits(name: str) -> None:
    model, pixels = build(name), images(name)
    vit = adapt(model)
    cut = some_cut(name, vit, pixels)
    other = cut.transpose(1, 2)
    both = attend(other, True)
    with torch.no_grad():
        expected = edited_logits(
            without_columns(model, "attn", 2, list(range(8))),
            pixels,
            lambda s: both(s).masked_fill(cut[:, None], 0.0),
        )
        with (
            knock_out(vit, cut, renormalise=False),
            knock_out(vit, other),
            ablate_heads(vit, {2: [0]}),
        ):
            assert torch.allclose(vit(pixels), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["cls", "torchvision", "beit", "hugging face, sdpa"])
def test_a_cut_among_the_tokens_that_are_left(name: str) -> None:
    model, pixels = build(name), images(name)
    vit = adapt(model)
    cut = some_cut(name, vit, pixels)
    keep = torch.tensor([[True, False] * 8, [False, True, True, False] * 4])
    cut[:, torch.arange(17), 0] = False
    left = kept_tokens(keep, vit.prefix_tokens).places
    inside = torch.stack([c[rows][:, rows] for c, rows in zip(cut, left, strict=True)])
    with torch.no_grad(), knock_out(vit, inside), remove_tokens(vit, keep):
        found = vit(pixels)
    expected = logits_without(model, pixels, keep, cut)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_a_cut_from_the_image_alone() -> None:
    model, pixels = build("registers"), images("registers")
    vit = adapt(model)
    size = (32, 32)
    corrected, paper = self_only(vit, size), self_only(vit, size, "paper")
    assert corrected.shape == paper.shape == (19, 19)
    assert not corrected[:3].any() and not corrected[:, :3].any()
    assert paper[3:, :3].all() and not paper[:3].any()
    assert torch.equal(corrected[3:, 3:], ~torch.eye(16, dtype=torch.bool))
    assert torch.equal(corrected[3:, 3:], paper[3:, 3:])
    assert no_cls(vit, size).nonzero().tolist() == [[i, 0] for i in range(3, 19)]
    with knock_out(vit, paper):
        alone = record(vit, pixels, ["resid_post"])["resid_post"][-1][:, 3:]
    # With nothing to attend to, an image token does not depend on the others.
    changed = pixels.clone()
    changed[..., 8:] += 1.0
    with knock_out(vit, paper):
        other = record(vit, changed, ["resid_post"])["resid_post"][-1][:, 3:]
    same = (alone == other).all(-1).view(2, 4, 4)
    assert same[:, :, 0].all() and not same[:, :, 1:].any()


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    "name", ["registers", "beit", "eva, shared keys and values", "torchvision"]
)
def test_half_precision(name: str, renormalise: bool) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        vit, pixels = adapt(build(name, dtype)), images(name, dtype=dtype)
        cut = some_cut(name, vit, pixels)
        keep = torch.rand(2, 16, generator=torch.Generator().manual_seed(4)) < 0.6
        left = kept_tokens(keep, vit.prefix_tokens).places.shape[1]
        inside = cut[:, :left, :left]
        inside[:, :, 0] = False
        with torch.no_grad():
            with knock_out(vit, cut, renormalise=renormalise), ablate_heads(vit, {0: [1]}):
                found.append(vit(pixels))
            with knock_out(vit, inside, renormalise=renormalise), remove_tokens(vit, keep):
                found.append(vit(pixels))
        assert found[-1].dtype == dtype
    for half, exact in zip(found[:2], found[2:], strict=True):
        assert (half - exact).norm() < 0.15 * exact.norm()


def test_edits_stay_in_their_thread() -> None:
    model, pixels = build("cls"), images("cls")
    vit = adapt(model)
    cut = some_cut("cls", vit, pixels)
    with torch.no_grad():
        whole = vit(pixels)
        inside, outside = [], []

        def elsewhere() -> None:
            with torch.no_grad():
                outside.append(vit(pixels))

        with (
            knock_out(vit, cut),
            ablate_heads(vit, {0: [1]}),
            remove_tokens(vit, torch.ones(2, 16, dtype=torch.bool)),
        ):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            inside.append(vit(pixels))
    assert torch.equal(outside[0], whole) and not torch.allclose(inside[0], whole)


def test_the_model_is_left_as_it_was() -> None:
    vit = adapt(build("torchvision"))
    pixels = images("torchvision")
    whole = vit(pixels)
    few = torch.zeros(5, 5, dtype=torch.bool)
    with (
        pytest.raises(InputError, match="2 images of 17 tokens"),
        knock_out(vit, few),
        ablate_heads(vit, {0: [0]}),
    ):
        vit(pixels)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in vit.modules())
    assert torch.equal(vit(pixels), whole)
    vit(pixels).sum().backward()


def test_what_reads_attention_is_refused_within_an_edit() -> None:
    vit = adapt(build("cls"))
    pixels = images("cls")
    with knock_out(vit, self_only(vit, (32, 32))):
        with pytest.raises(InputError, match="attention weights are computed from the model"):
            record(vit, pixels, ["attention"])
        with pytest.raises(InputError, match="attributions are computed from the model"):
            PatchImportance(vit).attribute(pixels, 0)
    with ablate_heads(vit, {0: [0]}):
        assert record(vit, pixels, ["attention"])["attention"][0]
        with pytest.raises(InputError, match="attributions are computed from the model"):
            PatchImportance(vit).attribute(pixels, 0)
    assert PatchImportance(vit).attribute(pixels, 0).shape == pixels.shape


def test_refusals_say_what_is_wrong() -> None:
    vit = adapt(build("cls"))
    cut = torch.zeros(17, 17, dtype=torch.bool)
    without_a_key = cut.clone()
    without_a_key[4] = True
    for context, message in (
        (knock_out(vit, cut.float()), "tokens×tokens"),
        (knock_out(vit, cut, blocks=[3]), "block 3 is out of range"),
        (knock_out(vit, without_a_key), "token 4 is cut off from every token"),
        (ablate_heads(vit, {0: [3]}), "head 3 is out of range"),
        (ablate_heads(vit, {-4: [0]}), "block -4 is out of range"),
        (ablate_memories(vit, "mlp", {0: [-1]}), "memory -1 is out of range"),
        (ablate_memories(vit, "both", {0: [0]}), "neither 'attn' nor 'mlp'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=message), context:
            pass
    with knock_out(vit, without_a_key, renormalise=False):
        assert vit(images("cls")).isfinite().all()
    with pytest.raises(UnsupportedModelError, match="no CLS"):
        no_cls(adapt(build("mean, no cls")), (32, 32))
    cait = adapt(build("cait"))
    with (
        pytest.raises(UnsupportedModelError, match="CLS alone asks"),
        knock_out(cait, self_only(cait, (32, 32))),
    ):
        cait(images("cait"))


def test_attention_without_a_softmax_is_refused() -> None:
    model = build("cls")

    class Linear(nn.Module):
        def forward(self, tokens: Tensor, **rest: object) -> Tensor:
            return tokens

    vit = adapt(model)
    vit.blocks[0].attentions[0].module = model.blocks[0].attn = Linear()  # type: ignore[union-attr,index,operator]
    with (
        pytest.raises(UnsupportedModelError, match="Linear ends in no softmax"),
        knock_out(vit, self_only(vit, (32, 32))),
    ):
        vit(images("cls"))
