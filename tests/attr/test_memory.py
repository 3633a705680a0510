"""The ledger adds up, entry by entry what a frozen model does without the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import case
from families import CLASSES, FAMILIES, WITHOUT_LEDGER, build, images, tiny
from torch import Tensor

from captum_classemb import MemoryPatchImportance
from captum_classemb.errors import InputError, TargetError, UnsupportedModelError

OBJECTIVES = ("logit", "log_probability")


@pytest.fixture(params=[name for name in FAMILIES if name not in WITHOUT_LEDGER])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def picked(logits: Tensor, target: Tensor, objective: str, p: Tensor) -> Tensor:
    """Entries of the target from entries of all classes (B×…×C): of z_c, or of z_c − Σ p z."""
    index = target.view(-1, *[1] * (logits.dim() - 1)).expand(*logits.shape[:-1], 1)
    own = logits.gather(-1, index)[..., 0]
    if objective == "logit":
        return own
    return own - torch.einsum("b...c,bc->b...", logits, p)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_entry_is_what_the_frozen_model_does_with_it_alone(
    family: str, objective: Any
) -> None:
    known = case(family)
    oracle, target = known.oracle, known.target
    oracle.check_whole()
    p = oracle.logits.softmax(-1)
    method = MemoryPatchImportance(known.vit, objective=objective)
    ledger = method.ledger(known.images, target)
    assert not ledger.total.requires_grad
    scale = ledger.magnitude.max()

    def same(entry: Tensor, logits: Tensor) -> bool:
        expected = picked(logits, target, objective, p)
        return float((entry - expected).abs().max()) <= 1e-10 * float(scale)

    for b in range(len(oracle.anatomy.layers)):
        assert same(ledger.attention[:, b], oracle.attention_entries(b)), f"attention {b}"
        assert same(ledger.mlp[:, b], oracle.mlp_entry(b)), f"MLP {b}"
    assert same(ledger.embedding, oracle.embedding_entry()), "embedding"
    assert same(ledger.bias, oracle.bias()), "bias"
    pool = oracle.pool_entry()
    if pool is None:
        assert ledger.pool is None
    else:
        assert ledger.pool is not None and same(ledger.pool, pool), "pool"
    if objective == "logit":
        assert ledger.entropy is None
    else:
        entropy = torch.distributions.Categorical(probs=p).entropy()
        assert ledger.entropy is not None
        assert torch.allclose(ledger.entropy, -entropy, rtol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_ledger_adds_up_to_the_models_own_score(family: str, objective: Any) -> None:
    known = case(family)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = known.vit if dtype == torch.float64 else known.single
        pixels = known.images.to(dtype)
        with torch.no_grad():
            output = model(pixels)
        logits = output if isinstance(output, Tensor) else output.logits
        scores = logits if objective == "logit" else logits.log_softmax(-1)
        own = scores.gather(1, known.target[:, None])[:, 0]
        ledger = MemoryPatchImportance(model, objective=objective).ledger(pixels, known.target)
        assert torch.allclose(ledger.score, own, rtol=1e-6)
        assert bool((ledger.delta.abs() <= tolerance * ledger.magnitude).all())
        assert torch.equal(ledger.delta, ledger.total - ledger.score)


def test_without_biases_no_bias_is_left(family: str) -> None:
    """It is computed from the biases: it would not be exactly 0 as a remainder."""
    model = build(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    ledger = MemoryPatchImportance(model).ledger(images(family), 2)
    assert torch.equal(ledger.bias, torch.zeros(2, dtype=torch.float64))
    assert bool((ledger.delta.abs() <= 1e-10 * ledger.magnitude).all())


def test_entries_by_memory(family: str) -> None:
    known = case(family)
    ledger = MemoryPatchImportance(known.vit).ledger(known.images, known.target, memories=True)
    assert ledger.mlp_memories is not None and ledger.attention_memories is not None
    scale = float(ledger.magnitude.max())
    by_head = ledger.attention.sum(-1)
    by_memory = ledger.attention_memories
    part = known.oracle.anatomy.layers[0].attentions[0]
    if not any("Norm" in type(norm).__name__ for norm in part.norms):
        # A norm before W_O adds its bias to the coefficients, and mixes heads.
        per_head = by_memory.unflatten(-1, (by_head.shape[-1], -1)).sum(-1)
        assert float((per_head - by_head).abs().max()) <= 1e-10 * scale
    for b in range(len(known.oracle.anatomy.layers)):
        memories = known.oracle.mlp_memories(b)
        expected = picked(memories, known.target, "logit", known.oracle.logits)
        assert float((ledger.mlp_memories[:, b] - expected).abs().max()) <= 1e-10 * scale
    assert float((ledger.mlp_memories.sum(-1) - ledger.mlp).abs().max()) <= 1e-10 * scale


def test_a_patch_is_the_sum_of_its_entries(family: str) -> None:
    known = case(family)
    method = MemoryPatchImportance(known.vit)
    ledger = method.ledger(known.images, known.target)
    patches = method.attribute_patches(known.images, known.target)
    prefix = known.oracle.anatomy.prefix
    assert torch.allclose(patches.flatten(3), ledger.attention[..., prefix:], rtol=1e-10)
    assert torch.allclose(ledger.patches, patches.sum((1, 2)).flatten(1), rtol=1e-9)
    pixels = method.attribute(known.images, known.target)
    assert torch.allclose(pixels.flatten(1).sum(1), ledger.patches.sum(1), rtol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_classes_at_once(family: str, objective: Any) -> None:
    known = case(family)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = known.vit if dtype == torch.float64 else known.single
        pixels = known.images.to(dtype)
        method = MemoryPatchImportance(model, objective=objective)
        together = method.attribute_classes(pixels)
        copies = pixels.repeat_interleave(CLASSES, 0)
        classes = torch.arange(CLASSES).repeat(len(pixels))
        one = method.attribute_patches(copies, classes).sum((1, 2)).unflatten(0, (-1, CLASSES))
        scale = float(one.abs().max())
        assert float((together - one).abs().max()) <= tolerance * scale
        some = method.attribute_classes(pixels, [4, 1])
        assert torch.allclose(some, together[:, [4, 1]], rtol=1e-4, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["cls", "mean, norm and gate", "distilled"])
def test_blocks_and_heads(name: str) -> None:
    known = case(name)
    full = MemoryPatchImportance(known.vit).attribute_patches(known.images, 1)
    method = MemoryPatchImportance(known.vit, blocks=[2, 0], heads=[2, 0, 1])
    some = method.attribute_patches(known.images, 1)
    assert torch.equal(some, full[:, [2, 0]][:, :, [2, 0, 1]])
    few = MemoryPatchImportance(known.vit, blocks=[1], heads=[2])
    together = few.attribute_classes(known.images)
    assert torch.allclose(together[:, 1], full[:, 1, 2], rtol=1e-9, atol=1e-14)


# -- Completeness, as Captum asks for it


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["cls", "mean, norm first", "padded", "distilled"])
def test_convergence_delta(name: str, objective: Any) -> None:
    known = case(name)
    method = MemoryPatchImportance(known.vit, objective=objective)
    assert method.has_convergence_delta() is True
    pixels, target = known.images, known.target
    maps, delta = method.attribute(pixels, target, return_convergence_delta=True)
    assert torch.allclose(maps, method.attribute(pixels, target), rtol=1e-9, atol=1e-14)
    assert delta.shape == (2,) and float(delta.abs().max()) < 1e-10
    again = method.compute_convergence_delta(maps, end_point=pixels, target=target)
    assert float(again.abs().max()) < 1e-10
    tupled = method.compute_convergence_delta((maps,), end_point=(pixels,), target=target)
    assert torch.equal(again, tupled)
    # It is no constant: attributions that are wrong by 1 are found to be.
    wrong = maps.clone()
    wrong[0, 0, 0, 0] += 1.0
    found = method.compute_convergence_delta(wrong, end_point=pixels, target=target)
    assert torch.allclose(found, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-10)


def test_a_delta_needs_every_entry_and_no_baseline() -> None:
    model, pixels = tiny(), torch.randn(1, 3, 32, 32)
    some = MemoryPatchImportance(model, heads=[0, 1])
    assert some.has_convergence_delta() is False
    with pytest.raises(InputError, match="needs all blocks and heads"):
        some.attribute(pixels, 1, return_convergence_delta=True)
    with pytest.raises(InputError, match="needs all blocks and heads"):
        some.compute_convergence_delta(pixels, end_point=pixels, target=1)
    whole = MemoryPatchImportance(model)
    with pytest.raises(InputError, match="start_point was given: the ledger has no baseline"):
        whole.compute_convergence_delta(pixels, pixels, pixels, target=1)
    with pytest.raises(InputError, match="end_point"):
        whole.compute_convergence_delta(pixels, target=1)
    shuffled = MemoryPatchImportance(model, blocks=[2, 1, 0])
    assert shuffled.has_convergence_delta() is True, "the order of the blocks changes no sum"


@pytest.mark.parametrize("name", sorted(WITHOUT_LEDGER))
def test_readouts_that_are_not_affine_are_refused(name: str) -> None:
    known = case(name)
    method = MemoryPatchImportance(known.vit)
    for run in (method.attribute, method.attribute_patches, method.ledger):
        with pytest.raises(UnsupportedModelError, match="no exact ledger"):
            run(known.images, 1)
    with pytest.raises(UnsupportedModelError, match="no exact ledger"):
        method.attribute_classes(known.images)


def test_wrong_options() -> None:
    with pytest.raises(InputError, match="'paper' is none of 'logit', 'log_probability'"):
        MemoryPatchImportance(tiny(), objective="paper")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="target 7 is out of range"):
        MemoryPatchImportance(tiny()).ledger(torch.zeros(1, 3, 32, 32), 7)
