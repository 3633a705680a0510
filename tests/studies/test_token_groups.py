from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.functional.identifiability import identifiability, rank
from captum_classemb.readout import ClassEmbedding, Linear, Norm, Part, Readout
from captum_classemb.studies import token_reader as projection
from captum_classemb.studies.class_and_context import ClassContextDifference
from captum_classemb.studies.class_identifiability import Accuracy, ClassIdentifiability
from captum_classemb.studies.group_means import GroupedMean
from captum_classemb.studies.identifiability.metric import (
    ClassSimilarityChangeRate,
    ResidualComposition,
)
from captum_classemb.studies.token_groups import membership
from captum_classemb.studies.token_reader import TokenReader, target_logits

B, H, W, P, R = 5, 2, 3, 2, 4
N = P + H * W


@pytest.fixture
def patches() -> Tensor:
    codes = torch.tensor([0, 1, 255], dtype=torch.uint8)[torch.randint(0, 3, (B, H, W))]
    codes[0] = 1  # an image without context
    codes[1] = 0  # an image without an object
    return codes


def in_group(group: int, image: int, token: int, patches: Tensor) -> bool:
    """The definition, one token at a time."""
    if token < P:
        return group == 0 and token == 0
    code = int(patches[image].flatten()[token - P])
    return (group == 1) or (group == 2 and code == 1) or (group == 3 and code == 0)


def test_membership(patches: Tensor) -> None:
    members = membership(B, N, P, patches)
    for g in range(4):
        for b in range(B):
            for n in range(N):
                assert bool(members[g, b, n]) == in_group(g, b, n, patches)
    assert not membership(1, 4, 0)[0].any()
    assert not membership(1, 4, 1)[2:].any()
    with pytest.raises(InputError, match="patches were given for 5 images of 5 patch tokens"):
        membership(B, N - 1, P, patches)


def test_grouped_mean_is_a_mean_over_the_groups_tokens(patches: Tensor) -> None:
    values = torch.randn(R, B, N)
    metric = GroupedMean(R)
    for part in (slice(0, 2), slice(2, B)):
        metric.update(values[:, part], membership(len(patches[part]), N, P, patches[part]))
    means = metric.compute()
    for g in range(4):
        picked = [
            values[:, b, n].double()
            for b in range(B)
            for n in range(N)
            if in_group(g, b, n, patches)
        ]
        torch.testing.assert_close(means.value[:, g], torch.stack(picked).mean(0))
        assert int(means.n[g]) == len(picked)


def test_class_identifiability_against_logits(patches: Tensor) -> None:
    classes = 3
    logits, target = torch.randn(R, B, N, classes), torch.randint(0, classes, (B,))
    wide = target[:, None].expand(B, N)
    ranks = torch.stack([rank(one, wide) for one in logits])
    r = torch.stack([identifiability(one, wide) for one in logits])
    metric = ClassIdentifiability(R, classes)
    metric.update(ranks, membership(B, N, P, patches))
    found = metric.compute()
    for g in range(4):
        tokens = [(b, n) for b in range(B) for n in range(N) if in_group(g, b, n, patches)]
        for row in range(R):
            scores = torch.stack([r[row, b, n] for b, n in tokens])
            assert float(found.mean[row, g]) == pytest.approx(float(scores.mean()), abs=1e-12)
            assert float(found.rate[row, g]) == float((scores == 1).double().mean())
            images = {b for b, _ in tokens}
            hit = {b for b, n in tokens if r[row, b, n] == 1}
            assert float(found.images[row, g]) == len(hit) / len(images)
            assert int(found.images_counted[g]) == len(images)


def test_change_rate_counts_strict_increases() -> None:
    before = torch.zeros(2, 1, 3)
    after = torch.tensor([[[5.0, 1.0, 0.0]], [[-1.0, -1.0, -1.0]]])
    metric = ClassSimilarityChangeRate(2)
    metric.update(after, before, membership(1, 3, 1))
    assert metric.compute().value[:, :2].tolist() == [[1.0, 0.5], [0.0, 0.0]]


def test_residual_composition_and_the_published_count() -> None:
    """Image tokens: one matches the MLP, one attention and the block before, one nothing."""
    matches = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()[:, None, None]
    members = membership(1, 4, 1)
    values = {}
    for variant in ("corrected", "paper"):
        metric = ResidualComposition(1, variant)
        metric.update(matches, members)
        values[variant] = metric.compute().value[:, 1].mul(3).round().tolist()
    assert values == {"corrected": [1, 1, 1, 1], "paper": [1, 1, 1, 2]}
    with pytest.raises(InputError, match="'published' is unknown"):
        ResidualComposition(1, "published").update(matches, members)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: GroupedMean(R),
        lambda: ClassIdentifiability(R, 7),
        lambda: ClassContextDifference(R, draws=500),
    ],
)
def test_metrics_resume_merge_and_pickle(make, patches: Tensor) -> None:  # type: ignore[no-untyped-def]
    values = torch.randint(0, 7, (R, B, N))

    def take(metric, part: slice) -> None:  # type: ignore[no-untyped-def]
        arguments = [values[:, part], membership(len(patches[part]), N, P, patches[part])]
        if isinstance(metric, ClassContextDifference):
            arguments.append(list(range(B))[part])
        metric.update(*arguments)

    def numbers(metric) -> list[Tensor]:  # type: ignore[no-untyped-def]
        return [torch.as_tensor(part).double() for part in metric.compute()]

    whole, first, second = make(), make(), make()
    take(whole, slice(0, B))
    take(first, slice(0, 2))
    take(second, slice(2, B))
    resumed = make()
    first.persistent(True)
    resumed.persistent(True)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    take(resumed, slice(2, B))
    merged = pickle.loads(pickle.dumps(first))
    merged.merge_state(second)
    for other in (resumed, merged):
        for expected, found in zip(numbers(whole), numbers(other), strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-12, atol=1e-12)


def test_accuracy() -> None:
    metric = Accuracy()
    metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
    share, images = metric.compute()
    assert (float(share), int(images)) == (pytest.approx(2 / 3), 3)


class Matrix(Readout):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.num_classes, self.reads = weight, weight.shape[0], slice(0, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, 0] @ self.weight.T

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        logits = tokens @ self.weight.T
        return logits if target is None else (tokens @ self.weight[target][..., None])[..., 0]


def class_embedding(weight: Tensor, bias: bool, norm: bool) -> ClassEmbedding:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    head.weight.data = weight
    layer = nn.LayerNorm(weight.shape[1])
    nn.init.normal_(layer.weight)
    part = Part(Linear(head), slice(0, 1))
    return ClassEmbedding([part], Norm(layer) if norm else None, None, weight.shape[0])


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("top", [0, 1, 3])
@pytest.mark.parametrize("kind", ["any", "plain", "bias", "norm"])
def test_token_scores(top: int, rows: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "chunk_rows", lambda *_: rows)
    weight = torch.randn(11, 6)
    matrix = Matrix(weight)
    readout = matrix if kind == "any" else class_embedding(weight, kind == "bias", kind == "norm")
    tokens, target = torch.randn(B, N, 6), torch.randint(0, 11, (B,))
    reference = torch.randint(0, 11, (B, N))
    scores = TokenReader(readout).scores(tokens, target, top, reference)
    logits = readout.project(tokens)
    reference_best = logits.argmax(-1) == reference
    expected = rank(logits, target[:, None].expand(B, N))
    assert torch.equal(scores.rank.long(), expected)
    assert torch.equal(scores.top, logits.topk(top).indices)
    assert torch.equal(scores.matches, reference_best) and reference_best.any()
    torch.testing.assert_close(scores.target_logit, readout.project(tokens, target))
    assert TokenReader(readout).scores(tokens, target).matches.numel() == 0


@pytest.mark.parametrize("kind", ["any", "plain", "bias", "norm"])
def test_target_logits(kind: str) -> None:
    weight = torch.randn(11, 6)
    matrix = Matrix(weight)
    readout = matrix if kind == "any" else class_embedding(weight, kind == "bias", kind == "norm")
    if kind == "norm":
        nn.init.normal_(readout.token_norm.module.bias)  # type: ignore[union-attr]
    tokens, target = torch.randn(B, N, 6) + 30, torch.randint(0, 11, (B,))
    found = target_logits(readout, tokens, target)
    torch.testing.assert_close(found, readout.project(tokens, target), rtol=1e-4, atol=1e-4)


def test_half_precision_tokens_are_ranked_in_float32() -> None:
    readout = class_embedding(torch.randn(11, 6), bias=True, norm=True)
    tokens, target = torch.randn(B, N, 6).bfloat16(), torch.randint(0, 11, (B,))
    half, single = (TokenReader(readout).scores(x, target) for x in (tokens, tokens.float()))
    assert torch.equal(half.rank, single.rank) and half.target_logit.dtype == torch.float32


def test_token_scores_count_ties_against_the_target_and_refuse_nan() -> None:
    target = torch.tensor([2])
    scores = TokenReader(Matrix(torch.zeros(4, 2))).scores(torch.ones(1, 1, 2), target)
    assert scores.rank.item() == 3
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        TokenReader(Matrix(torch.ones(4, 2))).scores(torch.full((1, 1, 2), torch.nan), target)
