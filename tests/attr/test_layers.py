"""Projections and memories of single modules, by Captum's LayerActivation and by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import LayerActivation
from cases import Case, case
from families import FAMILIES, WITHOUT_DIRECTIONS, images, tiny
from oracle import frozen_at
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb import (
    LayerClassEmbeddingProjection,
    LayerMemoryContribution,
    MemoryPatchImportance,
)
from captum_classemb.errors import InputError, UnsupportedModelError

# -- Projection


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize(
    "path", ["blocks.0", "blocks.1.attn", "blocks.2.mlp", "blocks.1.norm2", "norm"]
)
def test_projection_is_the_head_on_captums_layer_activation(path: str, of_input: bool) -> None:
    model: Any = tiny()
    layer, pixels = model.get_submodule(path), torch.randn(3, 3, 32, 32)
    lens = LayerClassEmbeddingProjection(model, layer)
    target = torch.tensor([6, 0, 2])
    scores = lens.attribute(pixels, target, attribute_to_layer_input=of_input)
    tokens = LayerActivation(model, layer).attribute(pixels, attribute_to_layer_input=of_input)
    logits = model.head(model.norm(tokens))
    assert scores.shape == (3, 17)
    expected = logits[torch.arange(3), :, target]
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_the_last_cls_token_gives_the_logit() -> None:
    known = case("cls")
    layers: Any = known.model
    lens = LayerClassEmbeddingProjection(known.vit, layers.blocks[-1])
    scores = lens.attribute(known.images, 4)
    assert torch.allclose(scores[:, 0], known.oracle.logits[:, 4], rtol=1e-10)


def test_the_layer_can_be_assigned_later() -> None:
    """Captum's concept methods make the attribution first and set its layer before each call."""
    model: Any = tiny()
    pixels = torch.randn(1, 3, 32, 32)
    lens = LayerClassEmbeddingProjection(model, None)
    with pytest.raises(InputError, match="layer is a NoneType: a module is needed"):
        lens.attribute(pixels, 1)
    for block in model.blocks:
        lens.layer = block
        expected = LayerClassEmbeddingProjection(model, block).attribute(pixels, 1)
        assert torch.equal(lens.attribute(pixels, 1), expected)


def test_layers_that_have_no_tokens_of_the_right_width() -> None:
    model: Any = tiny()
    pixels = torch.randn(1, 3, 32, 32)
    wrong = {
        "width 48, which the readout": model.blocks[0].mlp.fc1,
        r"shape \(1, 7\): tokens B×N×D": model.head,
    }
    for message, layer in wrong.items():
        with pytest.raises(InputError, match=message):
            LayerClassEmbeddingProjection(model, layer).attribute(pixels, 1)
    with pytest.raises(UnsupportedModelError, match="not called in the forward pass"):
        LayerClassEmbeddingProjection(model, nn.Linear(24, 24)).attribute(pixels, 1)
    with pytest.raises(InputError, match="layer is a list"):
        LayerClassEmbeddingProjection(model, [model.blocks[0]]).attribute(  # type: ignore[arg-type]
            pixels, 1
        )


# -- Memories


@pytest.fixture(params=[name for name in FAMILIES if name not in WITHOUT_DIRECTIONS])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def read_alone(known: Case, tokens: Tensor, token: int) -> Tensor:
    """One token, as if the model pooled it alone: B×C."""
    return known.oracle.anatomy.read(tokens[:, token : token + 1].expand_as(tokens))


def by_brute_force(known: Case, block: int, branch: str, token: int) -> Tensor:
    """What adding each memory of a branch to one last token does to its logits, σ frozen: B×M×C."""
    oracle = known.oracle
    layer, trace = oracle.anatomy.layers[block], oracle.trace
    part: Any = (layer.attentions if branch == "attn" else layer.mlps)[0]
    weight = (part.proj if branch == "attn" else part.fc2).weight[:, part.columns]
    outer = part.outer
    final = trace.final
    entered = {norm: _entering(known, norm, final, token) for norm in oracle.anatomy.norms}
    handles = [
        norm.register_forward_hook(frozen_at(x)) for norm, x in entered.items() if x is not None
    ]
    with torch.no_grad():
        if "Norm" in type(outer).__name__:
            handles.append(outer.register_forward_hook(frozen_at(trace.entered[outer])))
        memories = trace.coefficients if branch == "mlp" else trace.attn_coefficients
        # Of modules side by side, the first.
        m = memories[block][..., : weight.shape[1]]
        none = outer(torch.zeros_like(trace.branch[block]))
        zero, rows = read_alone(known, final, token), []
        for memory in range(m.shape[-1]):
            added = outer(m[..., memory : memory + 1] * weight[:, memory]) - none
            moved = final + oracle.in_place(layer, added)
            rows.append(read_alone(known, moved, token) - zero)
    for handle in handles:
        handle.remove()
    return torch.stack(rows, 1)


def _entering(known: Case, norm: nn.Module, final: Tensor, token: int) -> Tensor | None:
    """What enters one of the last norms when the token is read alone."""
    if "Norm" not in type(norm).__name__:
        return None
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    read_alone(known, final, token)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_every_memory_of_every_token(family: str, branch: str) -> None:
    known = case(family)
    part = known.vit.blocks[1]
    layer = (part.attentions if branch == "attn" else part.mlps)[0].module  # type: ignore[attr-defined]
    method = LayerMemoryContribution(known.vit, layer)
    scores = method.attribute(known.images, known.target)
    count = known.oracle.trace.resid_post[-1].shape[1]
    assert scores.shape[:2] == (2, count)
    # With two heads a patch is read by both, which the model's own pooling cannot show.
    for n in {0, count // 2, count - 1} if family != "distilled" else ():
        expected = by_brute_force(known, 1, branch, n)
        own = expected[torch.arange(2), :, known.target]
        assert torch.allclose(scores[:, n], own, rtol=1e-8, atol=1e-11), n


@pytest.mark.parametrize("name", ["cls", "layer scale", "post-norm", "rms norm", "registers"])
def test_memories_of_the_token_read_add_up_to_the_ledger(name: str) -> None:
    known = case(name)
    model: Any = known.model
    ledger = MemoryPatchImportance(model).ledger(known.images, known.target)
    for b, block in enumerate(model.blocks):
        for layer, entry in (
            (block.mlp, ledger.mlp[:, b]),
            (block.attn, ledger.attention[:, b].sum((1, 2))),
        ):
            method = LayerMemoryContribution(model, layer)
            read = method.attribute(known.images, known.target)[:, 0]
            assert torch.allclose(read.sum(1), entry, rtol=1e-8, atol=1e-12)


def test_layers_that_have_no_memories() -> None:
    model: Any = tiny()
    pixels = torch.randn(1, 3, 32, 32)
    for layer in (model.blocks[0], model.norm, nn.Linear(3, 3)):
        with pytest.raises(InputError, match="is no attention or MLP module of a block"):
            LayerMemoryContribution(model, layer).attribute(pixels, 1)
    method = LayerMemoryContribution(model, model.blocks[0].mlp)
    with pytest.raises(InputError, match="memories lie inside the layer"):
        method.attribute(pixels, 1, attribute_to_layer_input=True)


@pytest.mark.parametrize("name", sorted(WITHOUT_DIRECTIONS))
def test_memories_without_an_exact_share_are_refused(name: str) -> None:
    model: Any = case(name).model
    with pytest.raises(UnsupportedModelError, match="no exact share"):
        LayerMemoryContribution(model, model.blocks[0].mlp).attribute(images(name), 1)


def test_interpolation_by_captum() -> None:
    """Captum's ``interpolate`` takes B×channels×grid: a projection without its prefix tokens."""
    model: Any = tiny()
    lens = LayerClassEmbeddingProjection(model, model.blocks[1])
    scores = lens.attribute(torch.randn(2, 3, 32, 32), 3)[:, 1:].unflatten(1, (1, 4, 4))
    up = LayerClassEmbeddingProjection.interpolate(scores, (32, 32), "bilinear")
    assert torch.equal(up, F.interpolate(scores, (32, 32), mode="bilinear"))
