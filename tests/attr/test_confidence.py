"""A prediction that is all but certain, and a head of one logit, still have their maps."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import reference
import torch
from cases import Case, case
from families import SMALL, images, randomise, tiny, torchvision_vit
from oracle import Oracle
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_classemb import (
    AllPathImportance,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.errors import InputError

MARGINS = (1, 8, 16, 24, 50, 80, 200)
METHODS: dict[str, tuple[Any, Any]] = {
    "gradient": (ClassEmbeddingGradient, reference.gradient),
    "memory": (MemoryPatchImportance, reference.memory),
    "patches": (PatchImportance, reference.patch_importance),
    "paths": (AllPathImportance, reference.all_paths),
}
#: Fewer classes than dimensions, and more; one row read out, and all patches.
MODELS: dict[str, dict[str, Any]] = {
    "two classes": {"num_classes": 2},
    "seven classes": {"num_classes": 7},
    "sixty classes": {"num_classes": 60},
    "sixty classes, mean": {"num_classes": 60, "global_pool": "avg", "fc_norm": False},
}


@cache
def confident(name: str, margin: int) -> Case:
    """A model whose surest image has its first class ``margin`` above the second."""
    torch.manual_seed(0)
    settings = {**SMALL, "depth": 2, **MODELS[name]}
    model: Any = randomise(VisionTransformer(**settings)).double().eval()
    pixels = images("cls")
    with torch.no_grad():
        best = model(pixels).topk(2).values
        factor = margin / (best[:, 0] - best[:, 1]).max()
        model.head.weight.mul_(factor)
        model.head.bias.mul_(factor)
    # Weights that float32 holds exactly.
    model = model.float().double()
    family = "mean, norm first" if "mean" in name else "cls"
    return Case(family, model, pixels, Oracle(model, pixels))


def some_classes(known: Case) -> list[int]:
    """The classes of the surest image: first, second, one in the middle, last."""
    logits = known.oracle.logits
    best = logits.topk(2).values
    order = logits[int((best[:, 0] - best[:, 1]).argmax())].argsort(descending=True).tolist()
    return sorted({order[0], order[1], order[len(order) // 2], order[-1]})


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry of an image's map."""
    found = found.double().reshape(expected.shape)
    scale = expected.flatten(1).abs().amax(-1)
    return float(((found - expected).flatten(1).abs().amax(-1) / scale).max())


def bound(name: str, margin: int) -> float:
    return 1e-5 if name == "patches" else 1e-5 * (1 + margin)


def margins_of(name: str) -> tuple[int, ...]:
    return MARGINS if name == "patches" else MARGINS[:-1]


@pytest.mark.parametrize(
    ("name", "margin"), [(name, margin) for name in METHODS for margin in margins_of(name)]
)
@pytest.mark.parametrize("objective", ["logit", "log_probability"])
@pytest.mark.parametrize("model", MODELS)
def test_confident_predictions(model: str, objective: str, name: str, margin: int) -> None:
    """One class, all classes and float64 agree, at any confidence."""
    known, (kind, plain) = confident(model, margin), METHODS[name]
    method = kind(copy.deepcopy(known.model).float(), objective=objective)
    pixels = known.images.float()
    together = method.attribute_classes(pixels)
    for c in some_classes(known):
        expected = plain(known, torch.full((len(pixels),), c), objective).sum((1, 2))
        alone = method.attribute_patches(pixels, c).sum((1, 2))
        few = method.attribute_classes(pixels, [c])[:, 0]
        for found in (alone, few, together[:, c]):
            assert apart(found, expected) <= bound(name, margin), f"class {c}"
        assert apart(together[:, c], alone.double()) <= bound(name, margin), f"class {c}"


@pytest.mark.parametrize("margin", MARGINS[:-1])
@pytest.mark.parametrize("model", MODELS)
def test_the_published_objective_is_one_map_or_refused(model: str, margin: int) -> None:
    """Its map vanishes with 1 − p by definition; what is returned is the same in every way."""
    known = confident(model, margin)
    method = ClassEmbeddingGradient(copy.deepcopy(known.model).float())
    pixels = known.images.float()
    try:
        together = method.attribute_classes(pixels)
        alone = {c: method.attribute_patches(pixels, c).sum((1, 2)) for c in some_classes(known)}
    except InputError as error:
        assert "image" in str(error) and margin > 8
        return
    largest = together.flatten(1).abs().amax(1)[:, None, None]
    for c, found in alone.items():
        error = ((together[:, c] - found).abs() / largest).nan_to_num(nan=torch.inf).max()
        assert float(error) <= bound("gradient", margin), "of the largest class"
        if margin <= 8:
            plain = reference.gradient(known, torch.full((2,), c), "paper").sum((1, 2))
            assert apart(together[:, c], plain) <= 5e-3


@pytest.mark.parametrize("margin", MARGINS[:-1])
@pytest.mark.parametrize("score", ["logit", "log_probability", "probability"])
def test_projections_of_confident_predictions(score: Any, margin: int) -> None:
    known = confident("seven classes", margin)
    method = ClassEmbeddingProjection(copy.deepcopy(known.model).float(), score=score)
    pixels, tokens = known.images.float(), known.oracle.trace.resid_post[-1]
    together = method.attribute_classes(pixels)
    for c in some_classes(known):
        expected = reference.projection(known, torch.full((2,), c), score, tokens)
        alone = method.attribute_patches(pixels, c)
        assert apart(alone, expected) <= bound("projection", margin)
        assert apart(together[:, c], alone[:, 0].double()) <= bound("projection", margin)


@pytest.mark.parametrize("margin", [8, 80])
def test_the_ledger_of_a_sure_log_probability(margin: int) -> None:
    """Its entries are 1 − p_c times those of the log-odds, and tiny, but not noise."""
    known = confident("two classes", margin)
    method = MemoryPatchImportance(copy.deepcopy(known.model).float(), objective="log_probability")
    target = known.oracle.logits.argmax(1)
    found = method.ledger(known.images.float(), target)
    expected = reference.memory(known, target, "log_probability")
    assert apart(found.attention[..., 1:], expected) <= bound("memory", margin)


# -- One logit


def _huggingface() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 48}
    config = transformers.ViTConfig(
        **sizes, num_hidden_layers=3, num_attention_heads=3, num_labels=1
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


ONE_LOGIT: dict[str, Any] = {
    "cls": lambda: VisionTransformer(**{**SMALL, "num_classes": 1}),
    "mean, norm first": lambda: VisionTransformer(
        **{**SMALL, "num_classes": 1}, global_pool="avg", fc_norm=False
    ),
    "distilled": lambda: VisionTransformerDistilled(**{**SMALL, "num_classes": 1}),
    "torchvision": lambda: torchvision_vit(1),
    "hugging face, sdpa": _huggingface,
}


@cache
def one_logit(name: str) -> Case:
    model = randomise(ONE_LOGIT[name]()).double().eval()
    return Case(name, model, images(name), Oracle(model, images(name)))


@pytest.mark.parametrize("objective", ["logit", "log_probability"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ONE_LOGIT)
def test_one_logit_is_what_is_explained(model: str, name: str, objective: str) -> None:
    """There is nothing to compete with: log σ of the logit has the logit's direction."""
    known, (kind, plain) = one_logit(model), METHODS[name]
    target = torch.zeros(2, dtype=torch.int64)
    expected = plain(known, target, "logit")
    method = kind(known.model, objective=objective)
    found = method.attribute_patches(known.images).flatten(3)
    if objective == "log_probability" and name != "patches":
        # By one positive factor for an image, and for a block where each has its own readout.
        within = (2, 3) if name == "gradient" else (1, 2, 3)
        factor = (found * expected).sum(within, keepdim=True) / expected.square().sum(
            within, keepdim=True
        )
        assert bool((factor > 0).all())
        expected = factor * expected
    assert float(found.abs().amax((1, 2, 3)).min()) > 0
    assert apart(found, expected) <= 1e-9
    together = method.attribute_classes(known.images)
    assert apart(together[:, 0], found.sum((1, 2))) <= 1e-9
    single = kind(copy.deepcopy(known.model).float(), objective=objective)
    assert apart(single.attribute_classes(known.images.float()), together.flatten(2)) <= 1e-4


def test_the_published_objective_of_one_logit() -> None:
    known = one_logit("cls")
    found = ClassEmbeddingGradient(known.model).attribute_patches(known.images)
    assert float(found.abs().flatten(2).amax(-1).min()) > 0
    logit = ClassEmbeddingGradient(known.model, objective="logit")
    plain = logit.attribute_patches(known.images)
    for b in range(3):
        cosine = nn.functional.cosine_similarity(found[:, b].flatten(1), plain[:, b].flatten(1))
        assert float(cosine.min()) >= 1 - 1e-9


@pytest.mark.parametrize("objective", ["logit", "log_probability"])
def test_the_ledger_of_one_logit_adds_up(objective: Any) -> None:
    known = one_logit("cls")
    ledger = MemoryPatchImportance(known.model, objective=objective).ledger(known.images)
    assert bool((ledger.delta.abs() <= 1e-9 * ledger.magnitude).all())
    if objective == "logit":
        assert torch.allclose(ledger.score, known.oracle.logits[:, 0])


@pytest.mark.parametrize("name", METHODS)
def test_one_logit_of_the_registry(name: str) -> None:
    model = tiny(num_classes=1)
    maps = METHODS[name][0](model).attribute(torch.randn(2, 3, 32, 32))
    assert float(maps.abs().amax((1, 2, 3)).min()) > 0


def test_a_second_class_without_evidence_is_no_second_logit() -> None:
    """Two classes whose rows are opposite explain what one logit does, with twice the margin."""
    known = case("cls")
    single: Any = copy.deepcopy(known.model)
    double: Any = copy.deepcopy(known.model)
    for model, rows in ((single, [0]), (double, [0, 1])):
        head = nn.Linear(24, len(rows)).double()
        with torch.no_grad():
            head.weight.copy_(known.model.head.weight[0] * torch.tensor([[1.0], [-1.0]])[rows])
            head.bias.zero_()
        model.reset_classifier(len(rows))
        model.head = head
    one = MemoryPatchImportance(single).attribute_patches(known.images, 0)
    two = MemoryPatchImportance(double).attribute_patches(known.images, 0, contrast=1)
    assert apart(two, 2 * one) <= 1e-9
