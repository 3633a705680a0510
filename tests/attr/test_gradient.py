"""Gradient patch importance: the closed form against autograd on an unfused model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import case
from families import CLASSES, FAMILIES, build, images, randomise, tiny
from oracle import Oracle
from torch import Tensor, nn

from captum_classemb import ClassEmbeddingGradient
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout import ClassEmbedding, Linear, Norm, Part

OBJECTIVES = ("paper", "log_probability", "logit")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def worst(maps: Tensor, expected: Tensor, *, within: int) -> float:
    """The largest difference, relative to the largest entry within the last dimensions."""
    scale = expected.flatten(-within).abs().amax(-1)
    difference = (maps.double() - expected).flatten(-within).abs().amax(-1)
    return float((difference / scale).max())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_closed_form_is_autograd(family: str, objective: Any) -> None:
    known = case(family)
    method = ClassEmbeddingGradient(known.vit, objective=objective)
    maps = method.attribute_patches(known.images, known.target).flatten(3)
    expected = known.oracle.gradient(known.target, objective)
    expected = expected[..., known.oracle.anatomy.prefix :]
    assert maps.shape == expected.shape
    assert worst(maps, expected, within=1) <= 1e-9, "within one block and head"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_closed_form_in_float32(family: str, objective: Any) -> None:
    known = case(family)
    method = ClassEmbeddingGradient(known.single, objective=objective)
    maps = method.attribute_patches(known.images.float(), known.target).flatten(3)
    assert maps.dtype == torch.float32
    expected = known.oracle.gradient(known.target, objective)
    expected = expected[..., known.oracle.anatomy.prefix :]
    assert worst(maps, expected, within=3) <= 1e-5, "of an image's maps"
    assert worst(maps, expected, within=1) <= 1e-4, "within one block and head"


def one_by_one(method: Any, pixels: Tensor) -> Tensor:
    """The summed map of every class, each asked for as a target: B×C×h×w."""
    copies = pixels.repeat_interleave(CLASSES, 0)
    classes = torch.arange(CLASSES).repeat(len(pixels))
    maps: Tensor = method.attribute_patches(copies, classes).sum((1, 2))
    return maps.unflatten(0, (-1, CLASSES))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_classes_at_once(family: str, objective: Any) -> None:
    known = case(family)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = known.vit if dtype == torch.float64 else known.single
        pixels = known.images.to(dtype)
        method = ClassEmbeddingGradient(model, objective=objective)
        together = method.attribute_classes(pixels)
        assert together.shape[:2] == (len(pixels), CLASSES)
        one = one_by_one(method, pixels)
        # Against the largest entry over classes: a map may nearly vanish where p_c does.
        scale = float(one.abs().max())
        assert float((together - one).abs().max()) <= tolerance * scale
        some = method.attribute_classes(pixels, [5, 0, 5])
        assert torch.allclose(some, together[:, [5, 0, 5]], rtol=1e-4, atol=tolerance)


def test_classes_of_a_narrow_choice_of_blocks_and_heads() -> None:
    for name in ("cls", "mean, norm and gate"):
        known = case(name)
        method = ClassEmbeddingGradient(known.vit, blocks=[2, 0], heads=[1])
        together = method.attribute_classes(known.images)
        one = one_by_one(method, known.images)
        assert torch.allclose(together, one, rtol=1e-9, atol=1e-14)


# -- Where the published code reads


def changed(name: str, where: str) -> tuple[Any, Any]:
    """The family's model, and the same with other scales after the first attention branch."""
    plain: Any = build(name)
    other: Any = build(name)
    parameter = other.blocks[0].get_parameter(where)
    with torch.no_grad():
        parameter.copy_(parameter.flip(0) * 1.7)
    return plain, other


def first_block(model: nn.Module, pixels: Tensor, objective: Any) -> Tensor:
    method = ClassEmbeddingGradient(model, objective=objective, blocks=[0])
    return method.attribute_patches(pixels, 3)


@pytest.mark.parametrize("name", ["layer scale", "mean, layer scale"])
def test_the_published_objective_reads_before_layer_scale(name: str) -> None:
    plain, other = changed(name, "ls1.gamma")
    pixels = images(name)
    assert torch.equal(first_block(plain, pixels, "paper"), first_block(other, pixels, "paper"))
    for objective in ("log_probability", "logit"):
        one, two = (first_block(model, pixels, objective) for model in (plain, other))
        assert worst(one, two, within=2) > 0.1


def test_the_published_objective_reads_after_a_post_norm() -> None:
    plain, other = changed("post-norm", "norm1.weight")
    pixels = images("post-norm")
    one, two = (first_block(model, pixels, "paper") for model in (plain, other))
    assert worst(one, two, within=2) > 0.1


# -- Options


def test_the_default_is_the_published_objective() -> None:
    known = case("cls")
    default = ClassEmbeddingGradient(known.vit).attribute(known.images, 1)
    paper = ClassEmbeddingGradient(known.vit, objective="paper").attribute(known.images, 1)
    assert torch.equal(default, paper)


@pytest.mark.parametrize(
    ("blocks", "heads"),
    [([2, 0], None), (None, [2, 0, 1]), ([1], [2, 0]), ([-1], [-3]), (1, 2), (range(2), (1, 2))],
)
def test_blocks_and_heads_in_the_order_they_are_named(blocks: Any, heads: Any) -> None:
    known = case("cls")
    full = ClassEmbeddingGradient(known.vit).attribute_patches(known.images, 2)
    method = ClassEmbeddingGradient(known.vit, blocks=blocks, heads=heads)
    some = method.attribute_patches(known.images, 2)
    rows = [blocks] if isinstance(blocks, int) else list(range(3) if blocks is None else blocks)
    cols = [heads] if isinstance(heads, int) else list(range(3) if heads is None else heads)
    # Products of fewer blocks may be rounded otherwise.
    assert torch.allclose(some, full[:, rows][:, :, cols], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [3]}, "block 3 is out of range: the model has 3"),
        ({"blocks": [0, -4]}, "block -4 is out of range"),
        ({"heads": [7]}, "head 7 is out of range: the model has 3"),
        ({"heads": []}, "no head was chosen"),
        ({"blocks": [1, 1]}, "block 1 was chosen twice"),
        ({"heads": [0, -3]}, "head 0 was chosen twice"),
        ({"blocks": ["a"]}, "block 'a' is a str: an index is needed"),
        ({"heads": 1.5}, "head 1.5 is a float: an index is needed"),
        ({"heads": True}, "head True is a bool: an index is needed"),
        ({"objective": "nll"}, "'nll' is none of 'paper', 'log_probability', 'logit'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassEmbeddingGradient(tiny(), **options)


def test_pixels_share_the_sum_of_their_patch(family: str) -> None:
    known = case(family)
    method = ClassEmbeddingGradient(known.vit)
    patches = method.attribute_patches(known.images, known.target).sum((1, 2))
    pixels = method.attribute(known.images, known.target)
    assert pixels.shape == known.images.shape
    height, width = method.vit.patch_size
    for r in range(patches.shape[1]):
        for c in range(patches.shape[2]):
            rows, columns = slice(r * height, (r + 1) * height), slice(c * width, (c + 1) * width)
            own = pixels[..., rows, columns].flatten(1)
            assert torch.allclose(own.sum(1), patches[:, r, c], rtol=1e-9, atol=1e-14)
            assert torch.equal(own, own[:, :1].expand_as(own))


# -- Other readouts


class Headless:
    """A model without classifier, and a readout of 4 classes for it."""

    def __init__(self) -> None:
        self.model: Any = tiny(num_classes=0).double()
        self.head = randomise(nn.Linear(24, 4), seed=5).double()
        own = Part(Linear(self.head), slice(0, 1))
        self.readout = ClassEmbedding([own], Norm(self.model.norm), None, 4)


def test_a_given_readout_takes_the_place_of_the_models() -> None:
    given, pixels = Headless(), images("cls")
    method = ClassEmbeddingGradient(given.model, readout=given.readout, objective="log_probability")
    maps = method.attribute_patches(pixels, 3).flatten(3)
    whole: Any = tiny(num_classes=4).double()
    whole.load_state_dict(given.model.state_dict(), strict=False)
    whole.head = given.head
    oracle = Oracle(whole, pixels)
    expected = oracle.gradient(torch.tensor([3, 3]), "log_probability")[..., 1:]
    assert worst(maps, expected, within=1) <= 1e-9
    assert method.attribute_classes(pixels).shape == (2, 4, 4, 4)


def test_a_model_without_classifier_needs_a_readout() -> None:
    with pytest.raises(UnsupportedModelError, match=r"num_classes=0.*give a readout="):
        ClassEmbeddingGradient(tiny(num_classes=0))
