"""Every method against the plain reference of its map: one class, some classes, all classes."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import reference
import torch
from cases import Case, case
from families import CLASS_ATTENTION, CLASSES, FAMILIES, WITHOUT_LEDGER
from torch import Tensor

from captum_classemb import (
    AllPathImportance,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)

#: A method by its objective, and the reference of its map.
MAPS: dict[str, tuple[Any, Any, str]] = {
    f"{name}, {objective}": (kind, plain, objective)
    for name, kind, plain, objectives in (
        ("gradient", ClassEmbeddingGradient, reference.gradient, ("paper",)),
        ("gradient", ClassEmbeddingGradient, reference.gradient, ("logit", "log_probability")),
        ("memory", MemoryPatchImportance, reference.memory, ("logit", "log_probability")),
        ("patches", PatchImportance, reference.patch_importance, ("logit", "log_probability")),
        ("paths", AllPathImportance, reference.all_paths, ("logit", "log_probability", "both")),
    )
    for objective in objectives
}
SCORES = ("logit", "log_probability", "probability", "identifiability")


def exactness(family: str) -> float:
    """Eager attention of Hugging Face rounds its weights to float32, also in a float64 model."""
    return 1e-6 if family == "hugging face, eager" else 1e-9


def apart(found: Tensor, expected: Tensor, *, within: int) -> float:
    """The largest difference, relative to the largest entry within the last dimensions."""
    found = found.double().reshape(expected.shape)
    scale = expected.flatten(-within).abs().amax(-1)
    return float(((found - expected).flatten(-within).abs().amax(-1) / scale).max())


@pytest.fixture(params=MAPS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, name: str) -> str:
    chosen: str = request.param
    if name.startswith("memory") and chosen in WITHOUT_LEDGER:
        pytest.skip("the readout has no exact ledger")
    return chosen


@cache
def plain_maps(family: str, name: str) -> Tensor:
    """The reference's map of every class, blocks and heads summed: B×C×P."""
    known, (_, plain, objective) = case(family), MAPS[name]
    batch = len(known.images)
    targets = [torch.full((batch,), c) for c in range(CLASSES)]
    return torch.stack([plain(known, t, objective).sum((1, 2)) for t in targets], 1)


def method(name: str, model: Any) -> Any:
    kind, _, objective = MAPS[name]
    return kind(model, objective=objective)


def test_one_class(family: str, name: str) -> None:
    known, (_, plain, objective) = case(family), MAPS[name]
    expected = plain(known, known.target, objective)
    found = method(name, known.vit).attribute_patches(known.images, known.target)
    assert apart(found, expected, within=3) <= exactness(family)
    pixels = method(name, known.vit).attribute(known.images, known.target)
    assert torch.allclose(pixels.sum((1, 2, 3)), expected.sum((1, 2, 3)), atol=1e-6)
    single = method(name, known.single).attribute_patches(known.images.float(), known.target)
    assert single.dtype == torch.float32 and apart(single, expected, within=3) <= 2e-5


def test_classes_at_once(family: str, name: str) -> None:
    known, expected = case(family), plain_maps(family, name)
    # The published map nearly vanishes where the probability of its class does.
    within = 2 if name == "gradient, paper" else 1
    explained = method(name, known.vit)
    found = explained.attribute_classes(known.images)
    assert apart(found, expected, within=within) <= exactness(family)
    for some in ([4], [5, 0, 5]):
        few = explained.attribute_classes(known.images, some)
        assert apart(few, expected[:, some], within=within) <= exactness(family)
    single = method(name, known.single).attribute_classes(known.images.float())
    assert single.dtype == torch.float32 and apart(single, expected, within=2) <= 2e-5


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("model", [name for name in FAMILIES if name not in CLASS_ATTENTION])
def test_projection(model: str, kind: Any) -> None:
    known = case(model)
    for block, tokens in enumerate(known.oracle.trace.resid_post):
        projection = ClassEmbeddingProjection(known.vit, score=kind, block=block)
        plain = partial(reference.projection, known, objective=kind, tokens=tokens)
        found = projection.attribute_patches(known.images, known.target)
        assert apart(found[:, 0].flatten(1), plain(known.target), within=1) <= exactness(model)
        together = projection.attribute_classes(known.images)
        for c in range(CLASSES):
            expected = plain(torch.full((len(known.images),), c))
            scale = max(float(expected.abs().max()), 1e-30)
            assert float((together[:, c].flatten(1) - expected).abs().max()) <= 1e-6 * scale


@pytest.mark.parametrize("objective", ["logit", "log_probability"])
def test_patch_importance_of_the_logit_alone(objective: str) -> None:
    """The default is the log-probability; for the logit two of the three estimates are one."""
    known = case("cls")
    default = PatchImportance(known.vit).attribute_patches(known.images, known.target)
    named = PatchImportance(known.vit, objective=objective)
    same = torch.equal(default, named.attribute_patches(known.images, known.target))
    assert same == (objective == "log_probability")


@pytest.mark.parametrize("name", [name for name in MAPS if name.endswith("logit")])
def test_other_labels_change_no_map_of_a_logit(name: str) -> None:
    """So a multi-label head is explained by its logits, whatever its other labels say."""
    known: Case = case("cls")
    model: Any = known.oracle.model
    expected = method(name, known.vit).attribute_patches(known.images, 2)
    kept = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    try:
        with torch.no_grad():
            model.head.weight[3:].mul_(-7.0)
            model.head.bias[:2].add_(30.0)
        found = method(name, model).attribute_patches(known.images, 2)
    finally:
        with torch.no_grad():
            model.head.weight.copy_(kept[0])
            model.head.bias.copy_(kept[1])
    assert apart(found, expected, within=3) <= 1e-12
