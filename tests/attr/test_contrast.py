"""Why this class and not that one: the target's logit minus that of another class."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from cases import case
from families import FAMILIES, WITHOUT_LEDGER, tiny
from torch import Tensor

from captum_classemb import (
    AllPathImportance,
    ClassEmbeddingGradient,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.errors import InputError, TargetError

METHODS: dict[str, tuple[Any, Any]] = {
    "gradient": (ClassEmbeddingGradient, reference.gradient),
    "memory": (MemoryPatchImportance, reference.memory),
    "patches": (PatchImportance, reference.patch_importance),
    "paths": (AllPathImportance, reference.all_paths),
}
OBJECTIVES = ("logit", "log_probability")


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry of an image."""
    found = found.double().reshape(expected.shape)
    scale = expected.flatten(1).abs().amax(-1)
    return float(((found - expected).flatten(1).abs().amax(-1) / scale).max())


def others(logits: Tensor, target: Tensor) -> dict[str, tuple[Any, Tensor]]:
    """Every form of a contrast, and the classes that it names."""
    return {
        "int": (6, torch.full_like(target, 6)),
        "tensor": (torch.tensor([3, 0]), torch.tensor([3, 0])),
        "runner-up": ("runner-up", reference.runner_up(logits, target)),
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_a_difference(family: str, name: str, objective: str) -> None:
    """For log p as for the logit: log p_c - log p_other is the difference of the logits."""
    if name == "memory" and family in WITHOUT_LEDGER:
        pytest.skip("the readout has no exact ledger")
    known, (kind, plain) = case(family), METHODS[name]
    method = kind(known.vit, objective=objective)
    tolerance = 1e-6 if family == "hugging face, eager" else 1e-9
    for contrast, other in others(known.oracle.logits, known.target).values():
        expected = plain(known, known.target, objective, other)
        found = method.attribute_patches(known.images, known.target, contrast=contrast)
        assert apart(found, expected) <= tolerance
        pixels = method.attribute(known.images, known.target, contrast=contrast)
        summed = found.sum((1, 2, 3, 4))
        assert torch.allclose(pixels.sum((1, 2, 3)), summed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gradient", "memory"])
def test_linear_maps_are_differences_of_maps(name: str) -> None:
    known = case("registers")
    method = METHODS[name][0](known.vit, objective="logit")
    one, other = (method.attribute_patches(known.images, c) for c in (2, 5))
    assert apart(method.attribute_patches(known.images, 2, contrast=5), one - other) <= 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_LEDGER])
def test_the_ledger_of_a_difference_is_exact(family: str, objective: Any) -> None:
    known = case(family)
    method = MemoryPatchImportance(known.vit, objective=objective)
    plain = MemoryPatchImportance(known.vit, objective="logit")
    logits, target = known.oracle.logits, known.target
    for contrast, other in others(logits, target).values():
        ledger = method.ledger(known.images, target, contrast=contrast)
        difference = reference.score(logits, target, "logit", other)
        assert torch.allclose(ledger.score, difference, rtol=1e-6, atol=1e-9)
        assert bool((ledger.delta.abs() <= 1e-6 * ledger.magnitude).all())
        one, two = (plain.ledger(known.images, c) for c in (target, other))
        for part in ("attention", "mlp", "embedding", "bias"):
            expected = getattr(one, part) - getattr(two, part)
            scale = float(one.magnitude.max())
            assert float((getattr(ledger, part) - expected).abs().max()) <= 1e-10 * scale, part
        _, delta = method.attribute(
            known.images, target, contrast=contrast, return_convergence_delta=True
        )
        assert bool((delta.abs() <= 1e-6 * ledger.magnitude).all())


def test_the_runner_up_is_the_highest_other_logit_of_each_image() -> None:
    """Also where the target is not on top: then the class on top is."""
    known = case("cls")
    order = known.oracle.logits.argsort(1, descending=True)
    target = torch.stack([order[0, 0], order[1, 3]])
    method = MemoryPatchImportance(known.vit)
    found = method.ledger(known.images, target, contrast="runner-up")
    named = method.ledger(known.images, target, contrast=torch.stack([order[0, 1], order[1, 0]]))
    assert torch.equal(found.attention, named.attention)


WRONG: dict[str, tuple[Any, Any]] = {
    "the target itself": (3, 3),
    "the target of one image": (torch.tensor([2, 4]), torch.tensor([1, 4])),
    "one class for all, the target of an image": (torch.tensor([2, 4]), 4),
    "no class": (3, 7),
    "a negative class": (3, -1),
    "too many": (3, torch.tensor([1, 2, 4])),
    "no integers": (3, torch.tensor([1.0, 2.0])),
    "another word": (3, "second"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", METHODS)
def test_wrong_contrasts(name: str, wrong: str) -> None:
    method, pixels = METHODS[name][0](tiny(), objective="logit"), torch.randn(2, 3, 32, 32)
    target, contrast = WRONG[wrong]
    calls = [method.attribute, method.attribute_patches]
    for call in [*calls, method.ledger] if name == "memory" else calls:
        # A class that is none is a wrong class here as elsewhere.
        with pytest.raises((InputError, TargetError)) as caught:
            call(pixels, target, contrast=contrast)
        assert "target" not in wrong or isinstance(caught.value, InputError)
        assert str(caught.value).count("\n") == 0


def test_a_contrast_needs_another_class() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    for kind, _ in METHODS.values():
        method = kind(tiny(num_classes=1), objective="logit")
        for contrast in (0, "runner-up"):
            with pytest.raises(InputError, match="one class|one logit"):
                method.attribute(pixels, contrast=contrast)


def test_the_published_objective_has_no_contrast() -> None:
    method = ClassEmbeddingGradient(tiny(), objective="paper")
    for call in (method.attribute, method.attribute_patches):
        with pytest.raises(InputError, match="paper"):
            call(torch.randn(2, 3, 32, 32), 1, contrast=2)


@pytest.mark.parametrize("name", METHODS)
def test_a_contrast_is_given_by_name(name: str) -> None:
    method = METHODS[name][0](tiny(), objective="logit")
    with pytest.raises(TypeError):
        method.attribute_patches(torch.randn(1, 3, 32, 32), 1, None, 2)
