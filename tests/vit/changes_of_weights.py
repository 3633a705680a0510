"""Changes of weights: every one is read, at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from vit.changed import Parts, small
from vit.changes import (
    EITHER,
    EXACT,
    REFUSED,
    WITH_HUGGING_FACE,
    WITH_TORCHVISION,
    LowRank,
    Times,
    change,
)


def edited(name: str, block: int | None = None) -> Callable[[Parts], None]:
    """A weight edited through ``data``, which changes neither its version nor its address."""

    def apply(p: Parts) -> None:
        found = p.get(name, block)
        tensor = found if isinstance(found, Tensor) else found.weight
        tensor.data.mul_(1.7).add_(0.1)

    return apply


for label, place in {
    "W_O": ("proj", 1), "fc2": ("fc2", 0), "a norm's scale": ("norm1", 2),
    "the last norm's scale": ("norm", None), "the head": ("head", None),
    "positions": ("positions", None), "the patch embedding": ("conv", None),
}.items():  # fmt: skip
    change(f"data of {label}", EXACT)(edited(*place))


@change("data of the values' bias", EXACT)
def _(p: Parts) -> None:
    attention = p.get("attn", 1)
    for name, bias in attention.named_parameters():
        if name in ("qkv.bias", "in_proj_bias", "v_proj.bias"):
            bias.data[-32:] += 0.8


@change("a step of an optimiser", EXACT, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    for parameter in p.model.parameters():
        parameter.grad = 0.01 * torch.ones_like(parameter)
    torch.optim.SGD(p.model.parameters(), lr=1.0).step()
    p.model.zero_grad()


@change("weights loaded", EXACT, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    p.model.load_state_dict({k: 0.9 * v for k, v in p.model.state_dict().items()})


@change("parameters replaced", EXACT)
def _(p: Parts) -> None:
    for name in ("proj", "fc2"):
        module = p.get(name, 1)
        module.weight = nn.Parameter(module.weight.detach().flip(0))


@change("weights of two blocks tied", EXACT, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    p.get("proj", 2).weight = p.get("proj", 0).weight


@change("the head without bias", EXACT, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    p.get("head").bias = None


@change("frozen", EXACT)
def _(p: Parts) -> None:
    p.model.requires_grad_(False)


@change("NaN in a weight", REFUSED)
def _(p: Parts) -> None:
    p.get("fc1", 1).weight.data[0, 0] = torch.nan


@change("infinity in a bias", REFUSED, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    p.get("proj", 2).bias.data[3] = torch.inf


@change("pruned W_O", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    prune.l1_unstructured(p.get("proj", 1), "weight", 0.5)


@change("pruned, then edited", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    prune.l1_unstructured(p.get("fc2", 1), "weight", 0.5)
    p.get("fc2", 1).weight_orig.data.mul_(2)


@change("spectral norm", EITHER, libraries=WITH_TORCHVISION)
def _(p: Parts) -> None:
    parametrizations.spectral_norm(p.get("fc2", 2))
    p.model.eval()


@change("weight norm", EITHER)
def _(p: Parts) -> None:
    parametrizations.weight_norm(p.get("fc2", 1))
    p.get("fc2", 1).parametrizations.weight.original0.data.mul_(1.5)


@change("weight norm by hooks", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    weight_norm(p.get("fc2", 1))
    p.get("fc2", 1).weight_g.data.mul_(1.5)


@change("a parametrisation of the head and of W_O", EITHER)
def _(p: Parts) -> None:
    parametrize.register_parametrization(p.get("head"), "weight", Times())
    parametrize.register_parametrization(p.get("proj", 1), "weight", Times())


@change("low-rank adapters of a library", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> Any:
    peft = pytest.importorskip("peft")
    names = {"timm": ["qkv", "attn.proj", "fc2", "head"], "hugging face": ["o_proj", "fc2"]}
    config = peft.LoraConfig(target_modules=names[p.library], r=2, init_lora_weights=False)
    peft.get_peft_model(p.model, config).eval()


@change("low-rank updates by hand", EITHER, libraries=WITH_HUGGING_FACE)
def _(p: Parts) -> None:
    for name in ("proj", "fc2"):
        p.put(name, LowRank(p.get(name, 1)), 1)


@change("built in inference mode", EITHER, late=False)
def _(p: Parts) -> Any:
    with torch.inference_mode():
        p.model = small(p.library)
    return p.model
