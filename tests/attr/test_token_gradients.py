"""The gradient at every query token, against one call of autograd for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from captum_classemb.attr import ClassEmbeddingGradient
from captum_classemb.data import Preprocess, open_dataset
from captum_classemb.errors import InputError, UnsupportedModelError

TARGET = torch.tensor([2, 5])
SCORES = {
    "logit": lambda z, c: z[c],
    "log_probability": lambda z, c: z.log_softmax(-1)[c],
    "paper": lambda z, c: -F.cross_entropy(z.softmax(-1), c),
}


def by_autograd(model: Any, pixels: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """Gradients of each token's own score, token by token, as the published code takes them."""
    attention, coefficients = [], []
    x = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
    for block in model.blocks:
        y = block.norm1(x)
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT * block.attn.scale).softmax(-1).detach().requires_grad_()
        m = block.attn.norm((a @ v).transpose(1, 2).flatten(2))
        out = block.attn.proj(m)
        read = out if objective == "paper" else block.ls1(out)
        logits = model.head(model.norm(read))
        by_query, by_memory = [], []
        for token in range(out.shape[1]):
            score = sum(SCORES[objective](logits[b, token], TARGET[b]) for b in range(2))
            of_a, of_m = torch.autograd.grad(score, (a, m), retain_graph=True)
            by_query.append(of_a[:, :, token])
            by_memory.append(of_m[:, token])
        attention.append(torch.stack(by_query, 2))
        coefficients.append(torch.stack(by_memory, 1))
        x = x + block.ls1(out)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return torch.stack(attention, 1).detach(), torch.stack(coefficients, 1).detach()


@pytest.mark.parametrize("objective", SCORES)
@pytest.mark.parametrize("name", ["layer scale", "norm before W_O", "mean, norm first"])
def test_every_token_equals_autograd(name: str, objective: Any) -> None:
    model, pixels = families.build(name), families.images(name)
    method = ClassEmbeddingGradient(model, objective=objective)
    attention, coefficients = by_autograd(model, pixels, objective)
    found = method.attribute_tokens(pixels, TARGET)
    torch.testing.assert_close(found, attention, rtol=1e-9, atol=1e-11)
    found = method.attribute_tokens(pixels, TARGET, of="coefficients")
    torch.testing.assert_close(found, coefficients, rtol=1e-9, atol=1e-11)
    some = ClassEmbeddingGradient(model, objective=objective, blocks=[2, 0], heads=[1])
    found = some.attribute_tokens(pixels, TARGET)
    torch.testing.assert_close(found, attention[:, [2, 0]][:, :, [1]], rtol=1e-9, atol=1e-11)


def test_the_row_of_cls_is_the_map() -> None:
    for name in ("cls", "parallel modules", "torchvision", "differential"):
        model, pixels = families.build(name), families.images(name)
        method = ClassEmbeddingGradient(model)
        rows = method.attribute_tokens(pixels, TARGET)[:, :, :, 0, 1:]
        maps = method.attribute_patches(pixels, TARGET).flatten(3)
        torch.testing.assert_close(rows, maps, rtol=1e-9, atol=1e-12)


def test_published_gradients(assets: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    model.load_state_dict(load_file(assets / "weights/vit_tiny_patch16_224.safetensors"))
    golden = np.load(assets / "golden/paper_code.npz")["paper_gradient"]
    data = open_dataset(assets / "mini_imagenet_s", Preprocess(mode="squash"), None, 1000)
    sample = data[0]
    method = ClassEmbeddingGradient(model)
    found = method.attribute_tokens(sample.image[None], sample.label)[0, :, :, 0]
    expected = torch.from_numpy(golden[0])
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_refusals() -> None:
    pixels = families.images("cls")
    with pytest.raises(InputError, match="neither 'attention' nor 'coefficients'"):
        ClassEmbeddingGradient(families.build("cls")).attribute_tokens(pixels, 1, of="keys")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="only some of its tokens attend"):
        ClassEmbeddingGradient(families.build("cait")).attribute_tokens(pixels, 1)
