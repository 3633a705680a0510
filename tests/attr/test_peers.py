"""Baselines against their authors' own packages, where both define the same thing."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from families import torchvision_vit
from torch import Tensor, nn

from captum_classemb.attr.baselines import AttnLRP
from captum_classemb.functional.removal import patch_sums


def _small() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision_vit(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def _rules_of_lxt(model: nn.Module) -> None:
    # lxt is bound to some versions of transformers.
    patches = pytest.importorskip("lxt.efficient.patches", exc_type=ImportError)
    rules = {
        nn.GELU: patches.non_linear_forward,
        nn.LayerNorm: patches.layer_norm_forward,
        nn.MultiheadAttention: patches.cp_multi_head_attention_forward,
    }
    for module in model.modules():
        for kind, rule in rules.items():
            if isinstance(module, kind):
                module.original_forward = module.forward
                module.forward = MethodType(rule, module)


def test_attnlrp_is_that_of_lxt() -> None:
    """lxt's rules for torchvision's ViT hold attention too (its ``cp_LRP`` map)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    target = torch.tensor([3, 1])
    ours = AttnLRP(_small()).attribute(images, target)
    model = _small()
    _rules_of_lxt(model)
    tokens: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        tokens.append(args[0].detach().requires_grad_(True))
        return (tokens[0],)

    model.encoder.layers.register_forward_pre_hook(keep)  # type: ignore[operator, union-attr]
    model(images).gather(1, target[:, None]).sum().backward()
    assert tokens[0].grad is not None
    theirs = (tokens[0] * tokens[0].grad).sum(-1)[:, 1:].detach()
    found = patch_sums(ours, (4, 4)).flatten(1)
    assert (found - theirs).abs().max() <= 1e-6 * theirs.abs().max()
