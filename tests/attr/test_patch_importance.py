"""PatchImportance against autograd with every token detached that the readout does not read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from cases import case
from families import torchvision_vit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from captum_classemb.attr import MemoryPatchImportance
from captum_classemb.attr.patch_importance import PatchImportance
from captum_classemb.functional.sinks import sinks
from captum_classemb.vit import ViT, adapt, record
from captum_classemb.vit.stream import follows_rows

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}


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


def _timm(**options: Any) -> nn.Module:
    model: nn.Module = timm.models.VisionTransformer(**SMALL, **options)
    return model


def _created(name: str, size: int = 32) -> nn.Module:
    small = {key: SMALL[key] for key in ("embed_dim", "depth", "num_heads", "num_classes")}
    model: nn.Module = timm.create_model(name, img_size=size, **small)
    return model


def _rotary() -> nn.Module:
    model: nn.Module = timm.models.eva.Eva(**SMALL, use_rot_pos_emb=True, global_pool="token")
    return model


STREAMS: dict[str, Callable[[], nn.Module]] = {
    "cls": _timm,
    "registers and layer scale": lambda: _timm(reg_tokens=2, init_values=0.5),
    "query and key norms": lambda: _timm(qk_norm=True),
    "distilled": lambda: VisionTransformerDistilled(**SMALL),
    "torchvision": partial(torchvision_vit, 5),
    "hugging face": _huggingface,
    "rotary positions": _rotary,
    "class attention": lambda: _created("cait_xxs24_224"),
    "gated MLPs": lambda: _created("vit_giant_patch14_dinov2", 28),
}
POOLED: dict[str, Callable[[], nn.Module]] = {
    "mean": lambda: _timm(global_pool="avg", class_token=False),
    "mean beside cls": lambda: _timm(global_pool="avg", fc_norm=False),
    "attention pooling": lambda: _created("vit_base_patch16_siglip_224"),
    "relative positions": lambda: _created("vit_relpos_base_patch16_cls_224"),
}


def build(make: Callable[[], nn.Module]) -> ViT:
    torch.manual_seed(0)
    model = make().double().eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return adapt(model)


def batch(vit: ViT | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (32, 32) if vit is None or vit.image_size is None else vit.image_size
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    return images, torch.tensor([3, 1])


def on_grid(vit: ViT, images: Tensor, patches: Tensor) -> Tensor:
    unflat: Tensor = patches.unflatten(-1, vit.grid((images.shape[2], images.shape[3])))
    return unflat


def evidence(vit: ViT, images: Tensor, gradients: list[Tensor], rows: slice) -> Tensor:
    """Σ_q A·v·(W_Oᵀ g) of each block from gradients of what W_O returns, of patches: B×L×H×P."""
    recording = record(vit, images, {"values": slice(None), "attention": rows})
    maps = []
    for block, gradient in enumerate(gradients):
        (attention,) = vit.blocks[block].attentions
        z = gradient[:, rows] @ attention.proj.weight
        z = z.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        (a,), (v,) = recording["attention"][block], recording["values"][block]
        maps.append((a * (z @ v.transpose(-2, -1))).sum(2))
    return torch.stack(maps, 1)[..., vit.prefix_tokens :]


def detached_gradients(vit: ViT, images: Tensor, target: Tensor, rows: slice) -> list[Tensor]:
    """∂log p/∂(what each attention module returns), tokens outside ``rows`` held constant."""
    handles, outputs = [], []

    def detach_others(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if len(args) > 1 and isinstance(args[1], Tensor):  # class attention: patches, then CLS
            return (args[0].detach(), *args[1:]), kwargs
        tokens = args[0]
        kept = [tokens[:, : rows.start].detach(), tokens[:, rows], tokens[:, rows.stop :].detach()]
        return (torch.cat(kept, 1), *args[1:]), kwargs

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for block in vit.blocks:
        handles.append(block.module.register_forward_pre_hook(detach_others, with_kwargs=True))
        handles += [a.module.register_forward_hook(remember) for a in block.attentions]
    log_p = vit(images).log_softmax(-1).gather(1, target[:, None]).sum()
    for handle in handles:
        handle.remove()
    return list(torch.autograd.grad(log_p, outputs))


def through_the_residual_stream(vit: ViT, rows: slice, u: Tensor, tokens: int) -> list[Tensor]:
    """Gradients of what W_O returns if the final rows have gradient u and nothing else moves."""
    whole = torch.zeros(len(u), tokens, u.shape[2], dtype=torch.float64)
    whole[:, rows] = u
    gradients = []
    for block in vit.blocks:
        x = leaf = torch.zeros_like(whole).requires_grad_(True)
        for step in block.attentions[0].outer:
            x = step(x)
        gradients += torch.autograd.grad(x, leaf, whole)
    return gradients


def direct_evidence(vit: ViT, images: Tensor, target: Tensor) -> list[Tensor]:
    """The ledger's attention entries of the patches for z_c and for log p_c: B×L×H×P each."""
    estimates = []
    for objective in ("logit", "log_probability"):
        ledger = MemoryPatchImportance(vit, objective=objective).ledger(images, target)
        estimates.append(ledger.attention[..., vit.prefix_tokens :])
    return estimates


def by_hand(stream: Tensor, logit: Tensor, contrast: Tensor) -> Tensor:
    """(s + d + c)·√s for each image by itself."""
    maps = []
    for parts in zip(stream.relu(), logit, contrast, strict=True):
        shares = [part / part.sum((0, 1)).abs().sum() for part in parts]
        maps.append((shares[0] + shares[1] + shares[2]) * shares[0].sum((0, 1)).sqrt())
    return torch.stack(maps)


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_is_that_of_autograd_with_other_tokens_detached(name: str) -> None:
    vit = build(STREAMS[name])
    images, target = batch(vit)
    rows = vit.readout.reads
    assert follows_rows(vit, rows)
    stream = evidence(vit, images, detached_gradients(vit, images, target, rows), rows)
    expected = on_grid(vit, images, by_hand(stream, *direct_evidence(vit, images, target)))
    found = PatchImportance(vit).attribute_patches(images, target)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert stream[:, :-1].abs().sum() > 1e-3 * stream.abs().sum(), "earlier blocks must take part"


@pytest.mark.parametrize("name", POOLED)
def test_a_pooled_readout_holds_the_branches_of_later_blocks(name: str) -> None:
    vit = build(POOLED[name])
    images, target = batch(vit)
    rows = vit.readout.reads
    assert not follows_rows(vit, rows)
    recording = record(vit, images, {"final": rows, "embedding": slice(None)})
    final = recording["final"][0].clone().requires_grad_(True)
    log_p = vit.readout(final).log_softmax(-1).gather(1, target[:, None]).sum()
    (g,) = torch.autograd.grad(log_p, final)
    tokens = recording["embedding"][0].shape[1]
    stream = evidence(vit, images, through_the_residual_stream(vit, rows, g, tokens), rows)
    expected = on_grid(vit, images, by_hand(stream, *direct_evidence(vit, images, target)))
    found = PatchImportance(vit).attribute_patches(images, target)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_readout_without_a_ledger_gives_its_derivative() -> None:
    vit = build(lambda: _timm(global_pool="max"))
    images, target = batch()
    rows = vit.readout.reads
    recording = record(vit, images, {"final": rows, "embedding": slice(None)})
    final = recording["final"][0].clone().requires_grad_(True)
    logit = vit.readout(final).gather(1, target[:, None]).sum()
    log_p = vit.readout(final).log_softmax(-1).gather(1, target[:, None]).sum()
    tokens = recording["embedding"][0].shape[1]
    plain, contrast = (
        evidence(vit, images, through_the_residual_stream(vit, rows, g, tokens), rows)
        for score in (logit, log_p)
        for g in torch.autograd.grad(score, final)
    )
    expected = on_grid(vit, images, by_hand(contrast, plain, contrast))
    found = PatchImportance(vit).attribute_patches(images, target)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", [*STREAMS, *POOLED])
def test_all_classes_at_once_equal_one_at_a_time(name: str) -> None:
    vit = build((STREAMS | POOLED)[name])
    images, _ = batch(vit)
    importance = PatchImportance(vit)
    together = importance.attribute_classes(images)
    assert together.shape == (2, 5, *vit.grid((images.shape[2], images.shape[3])))
    for c in range(5):
        alone = importance.attribute_patches(images, c).sum((1, 2))
        assert torch.allclose(together[:, c], alone, rtol=1e-9, atol=1e-12)
    some = importance.attribute_classes(images, [4, 0])
    assert torch.allclose(some, together[:, [4, 0]], rtol=1e-9, atol=1e-12)


def test_pixels_share_the_sum_of_blocks_and_heads() -> None:
    vit = build(_timm)
    images, target = batch()
    maps = PatchImportance(vit).attribute_patches(images, target)
    assert maps.shape == (2, 3, 3, 4, 4)
    pixels = PatchImportance(vit).attribute(images, target)
    assert pixels.shape == images.shape
    assert torch.allclose(pixels.sum((1, 2, 3)), maps.sum((1, 2, 3, 4)))


def test_a_prediction_that_is_all_but_certain_keeps_its_contrast() -> None:
    """p_c rounds to 1 in float32: what is left for the others must still be told apart."""
    vit = build(_timm)
    images, _ = batch()
    target = vit(images).argmax(1)
    head = vit.model.head
    head.bias.data.zero_()
    head.weight.data.mul_(25 / vit(images).sort(1).values.diff()[:, -1].min())
    assert (vit(images).float().softmax(-1).amax(1) == 1).all()
    expected = PatchImportance(vit).attribute_patches(images, target)
    single = copy.deepcopy(vit.model).float()
    found = PatchImportance(single).attribute_patches(images.float(), target)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_the_model_and_the_surrounding_modes_are_left_alone() -> None:
    vit = build(_timm)
    images, target = batch()
    importance = PatchImportance(vit)
    expected = importance.attribute(images, target)
    with torch.inference_mode():
        assert torch.allclose(importance.attribute(images, target), expected)
    with torch.no_grad():
        assert torch.allclose(importance.attribute(images, target), expected)
    assert not expected.requires_grad
    for module in vit.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.requires_grad and p.grad is None for p in vit.parameters())


def _many_classes(**options: Any) -> nn.Module:
    model: nn.Module = timm.models.VisionTransformer(**SMALL | {"num_classes": 60}, **options)
    return model


@pytest.mark.parametrize("rows", [7, 512])
@pytest.mark.parametrize(
    "make",
    [_many_classes, lambda: VisionTransformerDistilled(**SMALL | {"num_classes": 60})],
    ids=["one row", "two rows"],
)
def test_more_classes_than_dimensions_follow_a_basis(
    make: Callable[[], nn.Module], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captum_classemb.attr.patch_importance._ROWS", rows)
    vit = build(make)
    images, _ = batch(vit)
    importance = PatchImportance(vit)
    together = importance.attribute_classes(images)
    for c in (0, 31, 59):
        alone = importance.attribute_patches(images, c).sum((1, 2))
        assert torch.allclose(together[:, c], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["cls, with sinks", "mean, with sinks"])
def test_sinks_do_not_stand_out_and_change_no_other_score(family: str) -> None:
    known = case(family)
    method = PatchImportance(known.vit)
    found = method.attribute_classes(known.images).flatten(2)
    with mock.patch.object(PatchImportance, "_spared", staticmethod(lambda done, maps: maps)):
        plain = method.attribute_classes(known.images).flatten(2)
    others = [p for p in range(16) if p not in (3, 9)]
    assert torch.equal(found[..., others], plain[..., others])
    bound = plain[..., others].sort(-1, descending=True).values[..., 3].clamp_min(0.0)
    for sink in (3, 9):
        assert torch.equal(found[..., sink], plain[..., sink].minimum(bound))
    assert not torch.equal(found, plain)
    by_head = method.attribute_patches(known.images, 2).sum((1, 2)).flatten(1)
    assert torch.allclose(by_head, found[:, 2], atol=1e-12)


@pytest.mark.parametrize("family", ["cls", "registers", "mean, fc_norm", "cait"])
def test_where_no_token_is_a_sink_the_map_is_what_it_was(family: str) -> None:
    known = case(family)
    found = PatchImportance(known.vit).attribute_classes(known.images)
    with mock.patch.object(PatchImportance, "_spared", staticmethod(lambda done, maps: maps)):
        assert torch.equal(found, PatchImportance(known.vit).attribute_classes(known.images))


def test_registers_and_cls_are_no_sinks_and_do_not_move_the_median() -> None:
    norms = torch.tensor([[1.0, 1.0, 1.0, 2.9, 3.1], [2.0, 2.0, 6.1, 5.9, 2.0]])
    expected = [[False, False, False, False, True], [False, False, True, False, False]]
    assert sinks(norms).tolist() == expected
    model = _timm(reg_tokens=4).eval()
    with torch.no_grad():
        model.reg_token.add_(100.0)
        model.cls_token.add_(100.0)
    maps = PatchImportance(model).attribute_patches(torch.randn(1, 3, 32, 32), 1)
    assert (maps.sum((1, 2)) != 0).all()
