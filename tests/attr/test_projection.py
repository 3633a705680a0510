"""The projection reads every token as the model reads the tokens it pools."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from cases import Case, case
from families import CLASS_ATTENTION, CLASSES, FAMILIES, images, tiny
from torch import Tensor

from captum_classemb import ClassEmbeddingProjection
from captum_classemb.attr.projection import SITE_NAMES, Score
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.grid import patch_index

SCORES = get_args(Score)


@pytest.fixture(params=[name for name in FAMILIES if name not in CLASS_ATTENTION])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def alone(known: Case, tokens: Tensor) -> Tensor:
    """Logits of each token, through the model's own pooling of an image of such tokens: B×N×C.

    Two heads read one token each; a patch is then read by both, and CLS by its own.
    """
    rows = []
    for n in range(tokens.shape[1]):
        rows.append(known.oracle.anatomy.read(tokens[:, n : n + 1].expand_as(tokens)))
    return torch.stack(rows, 1).detach()


def scored(logits: Tensor, target: Tensor, score: str) -> Tensor:
    """The definition of each score, from the logits of tokens."""
    own = logits[torch.arange(len(logits)), :, target]
    others = (logits >= own[..., None]).sum(-1) - 1
    return {
        "logit": own,
        "log_probability": own - logits.exp().sum(-1).log(),
        "probability": own.exp() / logits.exp().sum(-1),
        "identifiability": 1 - others.double() / logits.shape[-1],
    }[score]


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_patches(family: str, score: Score) -> None:
    known = case(family)
    vit, trace = known.vit, known.oracle.trace
    tokens = trace.resid_post[-1].detach()
    expected = scored(alone(known, tokens), known.target, score)[:, vit.prefix_tokens :]
    method = ClassEmbeddingProjection(known.vit, score=score)
    patches = method.attribute_patches(known.images, known.target)
    assert patches.shape == (2, 1, *vit.grid((known.images.shape[2], known.images.shape[3])))
    assert torch.allclose(patches.flatten(1).double(), expected.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("site", SITE_NAMES)
def test_sites_and_blocks(site: str, block: int) -> None:
    known = case("layer scale")
    trace = known.oracle.trace
    pre, attn = trace.resid_pre[block], trace.branch[block]
    layer: Any = known.model.blocks[block]  # type: ignore[index, union-attr]
    values = trace.values[block].transpose(1, 2).flatten(2)
    tokens = {
        "resid_pre": pre,
        "attn_out": attn,
        "resid_mid": pre + attn,
        "mlp_out": trace.mlp_branch[block],
        "resid_post": trace.resid_post[block],
        "value": layer.ls1(layer.attn.proj(values)),
    }[site].detach()
    expected = scored(alone(known, tokens), known.target, "logit")[:, 1:]
    method = ClassEmbeddingProjection(known.vit, site=site, block=block)
    patches = method.attribute_patches(known.images, known.target)
    assert torch.allclose(patches.flatten(1), expected, rtol=1e-9)


def test_the_default_reads_the_output_of_the_last_block() -> None:
    known = case("cls")
    default = ClassEmbeddingProjection(known.vit)
    explicit = ClassEmbeddingProjection(known.vit, None, "logit", "resid_post", 2)
    assert torch.equal(default.attribute(known.images, 1), explicit.attribute(known.images, 1))


@pytest.mark.parametrize("score", SCORES)
def test_pixels(family: str, score: Score) -> None:
    """Scores that are sums are shared among pixels, others are repeated over them."""
    known = case(family)
    method = ClassEmbeddingProjection(known.vit, score=score)
    patches = method.attribute_patches(known.images, known.target).flatten(1)
    pixels = method.attribute(known.images, known.target)
    assert pixels.shape == known.images.shape
    size = (known.images.shape[2], known.images.shape[3])
    index = patch_index(size, method.vit.grid(size), method.vit.patch_size)
    if score in ("probability", "identifiability"):
        assert torch.equal(pixels, patches[:, index][:, None].expand_as(pixels))
    else:
        sums = torch.zeros_like(patches)
        sums.index_add_(1, index.flatten(), pixels.sum(1).flatten(1))
        assert torch.allclose(sums, patches, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("score", SCORES)
def test_all_classes_at_once(score: Score) -> None:
    for name in ("cls", "mean, norm first", "distilled", "mlp head"):
        known = case(name)
        method = ClassEmbeddingProjection(known.vit, score=score)
        together = method.attribute_classes(known.images)
        assert together.shape == (2, CLASSES, 4, 4)
        for c in range(CLASSES):
            one = method.attribute_patches(known.images, c)[:, 0]
            assert torch.allclose(together[:, c], one, rtol=1e-10, atol=1e-13)
        assert torch.equal(method.attribute_classes(known.images, [6, 2]), together[:, [6, 2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "rank"}, "score 'rank' is none of 'logit', 'log_probability'"),
        ({"site": "embedding"}, "site 'embedding' is none of 'resid_pre', 'attn_out'"),
        ({"block": 3}, "block 3 is out of range: the model has 3"),
        ({"block": None}, "block None is a NoneType: an index is needed"),
        ({"block": [0, 1]}, r"block \[0, 1\] is a list: an index is needed"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassEmbeddingProjection(tiny(), **options)


@pytest.mark.parametrize("name", sorted(CLASS_ATTENTION))
def test_blocks_that_hold_no_patches_are_refused(name: str) -> None:
    known = case(name)
    method = ClassEmbeddingProjection(known.vit)
    for run in (method.attribute, method.attribute_patches):
        with pytest.raises(UnsupportedModelError, match="holds no patch tokens"):
            run(known.images, 1)
    with pytest.raises(UnsupportedModelError, match="holds no patch tokens"):
        method.attribute_classes(known.images)


def test_scores_are_finite_and_bounded() -> None:
    known = case("cls")
    for score in ("probability", "identifiability"):
        method = ClassEmbeddingProjection(known.vit, score=score)  # type: ignore[arg-type]
        together = method.attribute_classes(images("cls", 3))
        assert float(together.min()) > 0.0 and float(together.max()) <= 1.0
