"""A register for a trained model, against timm's own modules called by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from families import build, images
from timm.models.eva import Eva
from torch import Tensor

from captum_classemb import (
    AllPathImportance,
    ClassEmbeddingGradient,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.edit import remove_tokens, sink_neurons, with_register
from captum_classemb.edit.registers import Neuron
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.sinks import sinks
from captum_classemb.vit import adapt, record

NEURONS = (Neuron(0, 3), Neuron(1, 7), Neuron(0, 11))


def by_hand(model: Any, x: Tensor, neurons: Any, prefix: int) -> Tensor:
    """The logits of a timm model with a register behind its ``prefix`` tokens."""
    tokens = model.pos_drop(model._pos_embed(model.patch_embed(x)))
    zeros = torch.zeros_like(tokens[:, :1])
    tokens = torch.cat([tokens[:, :prefix], zeros, tokens[:, prefix:]], 1)
    tokens = model.norm_pre(tokens)
    for b, block in enumerate(model.blocks):
        tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
        hidden = block.mlp.norm(block.mlp.act(block.mlp.fc1(block.norm2(tokens))))
        for neuron in neurons:
            if neuron.block == b:
                for image in hidden:
                    own = image[prefix + 1 :, neuron.unit]
                    image[prefix, neuron.unit] = own[own.abs().argmax()]
                    image[prefix + 1 :, neuron.unit] = 0
        tokens = tokens + block.ls2(block.mlp.fc2(hidden))
    return model.head(model.norm(tokens)[:, 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("cls", 1), ("registers", 3), ("layer scale", 1), ("cls, norm before the blocks", 1)],
)
def test_against_modules_called_by_hand(family: str, prefix: int) -> None:
    model, x = build(family), images(family)
    edited = with_register(model, NEURONS)
    assert edited.prefix_tokens == prefix + 1
    with torch.no_grad():
        assert torch.allclose(edited(x), by_hand(model, x, NEURONS, prefix), atol=1e-12)
        assert not torch.allclose(edited(x), adapt(model)(x), atol=1e-3)


def test_without_neurons_one_zero_token_is_there() -> None:
    model, x = build("cls"), images("cls")
    with torch.no_grad():
        assert torch.allclose(with_register(model, ())(x), by_hand(model, x, (), 1), atol=1e-12)


@pytest.mark.parametrize("library", ["cls", "hugging face, sdpa", "torchvision"])
def test_attributions_take_it(library: str) -> None:
    model, x = build(library), images(library)
    edited = with_register(model, NEURONS)
    ledger = MemoryPatchImportance(edited).ledger(x, 2)
    assert ledger.delta.abs().max() < 1e-9
    logits = edited(x)
    assert torch.allclose(ledger.score, logits[:, 2], atol=1e-9)
    for method in (PatchImportance, ClassEmbeddingGradient, MemoryPatchImportance):
        maps = method(edited).attribute_patches(x, 2).sum((1, 2))
        assert maps.shape == (2, 4, 4)
        every = method(edited).attribute_classes(x, [2])[:, 0]
        assert torch.allclose(maps, every, atol=1e-9)
        assert not torch.allclose(maps, method(model).attribute_patches(x, 2).sum((1, 2)))
    kept = record(edited, x, ["resid_post"])
    assert kept["resid_post"][0].shape[1] == 16 + 2
    with remove_tokens(edited, torch.arange(9).expand(2, -1)):
        assert edited(x).shape == logits.shape


def test_all_paths_say_that_activations_move() -> None:
    edited = with_register(build("cls"), NEURONS)
    with pytest.raises(UnsupportedModelError, match="sums over all paths"):
        AllPathImportance(edited).attribute(images("cls"), 2)


def test_changed_models_are_read_again() -> None:
    model: Any = build("cls")
    edited, x = with_register(model, NEURONS), images("cls")
    method = MemoryPatchImportance(edited)
    method.attribute(x, 2)
    with torch.no_grad():
        model.head.weight.mul_(2)
    method.attribute(x, 2)
    assert edited.prefix_tokens == 2
    with torch.no_grad():
        assert torch.allclose(edited(x), by_hand(model, x, NEURONS, 1), atol=1e-12)


def test_the_model_is_handed_back_and_copies_work() -> None:
    model, x = build("cls"), images("cls")
    before = adapt(model)(x)
    edited = with_register(model, NEURONS)
    expected = edited(x)
    assert torch.equal(adapt(model)(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for copied in (copy.deepcopy(edited), pickle.loads(pickle.dumps(edited))):
        assert torch.equal(copied(x), expected)


def test_neurons_by_hand() -> None:
    """Two neurons write what makes two patches loud; others are louder elsewhere."""
    model, x = build("cls"), images("cls", batch=3)
    with torch.no_grad():
        block: Any = model.blocks[0]  # type: ignore[index]
        block.mlp.fc2.weight[:, [5, 8]] = 60.0 * torch.randn(24, 2, dtype=torch.float64)
        block.mlp.fc1.weight[[5, 8]] *= 3.0
    vit = adapt(model)
    kept = record(vit, x, ["resid_post", "mlp_coefficients"])
    masks = [sinks(t[:, 1:].norm(dim=-1)) for t in kept["resid_post"]]
    assert masks[-1].any()
    peak = int(torch.tensor([int(m.sum()) for m in masks]).argmax())
    if peak == 0:
        with pytest.raises(InputError, match="neurons before"):
            sink_neurons(model, x, 2)
        return
    scores = torch.stack([c[0][:, 1:][masks[-1]].abs().mean(0) for c in kept["mlp_coefficients"]])
    best = scores[:peak].flatten().topk(4).indices
    expected = [Neuron(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in best]
    assert sink_neurons(model, x, 4) == expected


def test_neurons_of_an_edited_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak after block 2: the neurons of blocks 0 and 1 are ranked by their own mean."""
    model, x = build("cls, with sinks"), images("cls, with sinks", batch=3)
    kept = record(adapt(model), x, ["resid_post", "mlp_coefficients"])
    mask = sinks(kept["resid_post"][-1][:, 1:].norm(dim=-1))
    counts = [int(sinks(t[:, 1:].norm(dim=-1)).sum()) for t in kept["resid_post"]]
    peak = counts.index(max(counts))
    flat = [
        (float(c[0][:, 1:][mask].abs().mean(0)[unit]), Neuron(b, unit))
        for b, c in enumerate(kept["mlp_coefficients"])
        for unit in range(c[0].shape[-1])
        if b < peak
    ]
    expected = [neuron for _, neuron in sorted(flat, reverse=True)[:6]]
    if expected:
        assert sink_neurons(model, x, 6) == expected
    else:
        with pytest.raises(InputError):
            sink_neurons(model, x, 6)


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("mean, fc_norm", "reads patches"),
        ("beit", "reads patches"),
        ("cait", "class attention"),
    ],
)
def test_models_without_a_place(family: str, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        with_register(build(family), NEURONS)


def test_positions_beside_tokens_are_refused() -> None:
    model = Eva(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5,
        use_rot_pos_emb=True, global_pool="token",
    ).eval()  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="positions beside their tokens"):
        with_register(model, NEURONS)(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("neuron", [(9, 0), (0, 10_000), (0, -1), (-1, 0)])
def test_neurons_that_do_not_exist(neuron: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        with_register(build("cls"), [Neuron(*neuron)])


def test_without_sinks_there_is_nothing_to_move() -> None:
    with pytest.raises(InputError, match="nothing to move"):
        sink_neurons(build("cls"), images("cls"))
