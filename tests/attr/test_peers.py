"""Baselines against their authors' own packages, where both define the same thing."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from captum import attr as captum
from families import torchvision_vit
from torch import Tensor, nn

from captum_classemb.attr import METHODS
from captum_classemb.attr.baselines import CPLRP, LeGrad
from captum_classemb.evaluation.removal_order import patch_sums
from captum_classemb.vit import ViT, adapt

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The methods of other packages that the study of faithfulness compares with."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    known = dict(METHODS)
    yield importlib.import_module("compared")
    for name in METHODS.keys() - known.keys():
        del METHODS[name]


def _drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return model.double().eval()


def _small(norm_eps: float = 1e-6) -> ViT:
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5
    )
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = norm_eps
    return adapt(_drawn(model))


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.tensor([3, 1])


def _agree(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def _stretched(maps: Tensor) -> Tensor:
    """From 0 to 1, as peers return their maps."""
    low, high = maps.flatten(1).aminmax(dim=1)
    return (maps - low[:, None, None]) / (high - low)[:, None, None]


def test_grad_cam_is_that_of_grad_cam(others: Any) -> None:
    pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    vit, (images, target) = _small(), _batch()
    ours = others.grad_cam(vit)(images, target)
    layer = others.last_norm(vit)
    targets = [ClassifierOutputTarget(int(c)) for c in target]

    def reshape(tokens: Tensor) -> Tensor:
        patches: Tensor = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        return patches

    with GradCAM(vit, [layer], reshape_transform=reshape) as cam:
        cam(images, targets)
        made = cam.activations_and_grads
        (kept,), (slopes,) = made.activations, made.gradients
        theirs = cam.get_cam_image(images, layer, targets, kept.numpy(), slopes.numpy())
    _agree(ours, torch.from_numpy(theirs).relu(), 1e-12)
    # The study gets them enlarged, in float32; the library scales to 0-1 twice.
    enlarged = torch.from_numpy(scale_cam_image(scale_cam_image(ours.numpy(), (32, 32))))
    row = others.peers.grad_cam(vit)(images, target)
    _agree(row, patch_sums(enlarged[:, None], (4, 4)), 1e-6)


def test_legrad_is_that_of_legrad_torch(others: Any) -> None:
    """With all blocks there, and no ε here: theirs leaves the norm without one."""
    pytest.importorskip("legrad")
    vit, (images, target) = _small(norm_eps=1e-12), _batch()
    theirs = others.peers.legrad(vit, layer_index=0)(images, target)
    ours = patch_sums(LeGrad(vit).attribute(images, target), (4, 4))
    _agree(_stretched(ours), theirs, 1e-9)
    last = others.peers.legrad(vit)(images, target)
    assert (last - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["pytorch-grad-cam", "legrad-torch", "lxt-cp-lrp", "lxt-attnlrp"])
def test_a_peer_leaves_the_model_as_it_was(others: Any, name: str) -> None:
    _, build, library = others.OTHERS[name]
    pytest.importorskip(library)
    vit, (images, target) = _small(), _batch()
    modules: list[Any] = list(vit.model.modules())
    before, state = vit(images), [dict(vars(m)) for m in modules]
    maps = build(vit)(images, target)
    assert maps.shape == (2, 4, 4)
    assert not maps.requires_grad
    assert torch.equal(vit(images), before)
    assert [dict(vars(m)) for m in modules] == state
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_cp_lrp_is_that_of_lxt(others: Any) -> None:
    pytest.importorskip("lxt")
    vit, (images, target) = _small(), _batch()
    ours = patch_sums(CPLRP(vit).attribute(images, target), (4, 4))
    _agree(ours, others.peers.cp_lrp(vit)(images, target), 1e-6)
    other = others.peers.attn_lrp(vit)(images, target)
    assert (ours - other).abs().max() > 1e-2 * ours.abs().max()


def test_cp_lrp_is_that_of_lxt_for_torchvision(others: Any) -> None:
    """lxt's rules for torchvision's ViT freeze attention too (its ``cp_LRP`` map)."""
    pytest.importorskip("lxt")
    rules = others.peers.lxt_rules()
    images, target = _batch()
    ours = CPLRP(_drawn(torchvision_vit(5))).attribute(images, target)
    model: Any = _drawn(torchvision_vit(5))
    frozen: dict[type[nn.Module], Any] = {
        nn.GELU: rules.non_linear_forward,
        nn.LayerNorm: rules.layer_norm_forward,
        nn.MultiheadAttention: rules.cp_multi_head_attention_forward,
    }
    for module in model.modules():
        for kind, rule in frozen.items():
            if isinstance(module, kind):
                module.original_forward = module.forward
                module.forward = MethodType(rule, module)
    tokens: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        tokens.append(args[0].detach().requires_grad_(True))
        return (tokens[0],)

    model.encoder.layers.register_forward_pre_hook(keep)
    model(images).gather(1, target[:, None]).sum().backward()
    assert tokens[0].grad is not None
    theirs = (tokens[0] * tokens[0].grad).sum(-1)[:, 1:].detach()
    _agree(patch_sums(ours, (4, 4)).flatten(1), theirs, 1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "captum-integrated-gradients",
        "captum-input-x-gradient",
        "captum-saliency",
        "captum-feature-ablation",
    ],
)
def test_captums_methods_are_captums(others: Any, name: str) -> None:
    vit, (images, target) = _small(), _batch()
    (caption, build, _), mask = others.OTHERS[name], vit.feature_mask((32, 32))
    own: dict[str, Any] = {
        "captum-integrated-gradients": lambda: captum.IntegratedGradients(vit).attribute(
            images, target=target, n_steps=20
        ),
        "captum-input-x-gradient": lambda: captum.InputXGradient(vit).attribute(
            images.requires_grad_(), target=target
        ),
        "captum-saliency": lambda: captum.Saliency(vit).attribute(
            images.requires_grad_(), target=target
        ),
        "captum-feature-ablation": lambda: captum.FeatureAblation(vit).attribute(
            images, target=target, feature_mask=mask
        ),
    }
    expected = patch_sums(own[name]().detach(), (4, 4))
    method = others.OtherMethod(build, vit)
    _agree(method.attribute_patches(images.detach(), target)[:, 0], expected, 1e-12)
    _agree(method.attribute_classes(images.detach(), [1])[1, 0], expected[1], 1e-12)
    assert caption
