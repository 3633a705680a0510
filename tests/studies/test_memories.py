from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import wilcoxon

from captum_classemb.readout import read_vectors
from captum_classemb.studies.memories.metric import (
    ClassValueAgreement,
    KeyValueAgreement,
    MemoryCompositionality,
    random_classes,
)
from captum_classemb.studies.memories.value_vectors import compositional, keys_agree
from captum_classemb.studies.token_groups import membership

C, D, M, K = 9, 6, 20, 3


def test_agreement_and_compositionality_by_definition() -> None:
    batch, tokens = 4, 5
    embedding, values = torch.randn(C, D), torch.randn(M, D)
    strongest = torch.randn(batch, tokens, M).topk(K).indices
    target, top = torch.randint(0, C, (batch,)), torch.randint(0, C, (batch, tokens))
    found = read_vectors(values, embedding, K)
    logits = embedding @ values.T
    corrected = keys_agree(strongest, found, target)
    paper = keys_agree(strongest, found, target, "paper")
    same = compositional(strongest, found, top)
    for b in range(batch):
        for n in range(tokens):
            memories = strongest[b, n].tolist()
            classes = [set(logits[:, m].topk(K).indices.tolist()) for m in memories]
            assert bool(corrected[b, n]) == any(int(target[b]) in some for some in classes)
            best = set(logits[target[b]].topk(K).indices.tolist())
            assert bool(paper[b, n]) == bool(best & set(memories))
            expected = [int(logits[:, m].argmax()) == int(top[b, n]) for m in memories]
            assert same[b, n].tolist() == expected
    members = membership(batch, tokens, 1)
    rate = KeyValueAgreement(1, "paper")
    rate.update([strongest], [found], target, members)
    assert rate.compute().value[0, 1] == paper[:, 1:].double().mean()
    share = MemoryCompositionality(1)
    share.update([strongest], [found], top[None], members)
    torch.testing.assert_close(share.compute().value[0, 1], same[:, 1:].double().mean())


def test_random_classes_are_never_the_target_and_follow_the_index() -> None:
    target = torch.arange(300) % C
    drawn = random_classes(target, range(300), C)
    assert not (drawn == target).any()
    assert set(drawn.tolist()) == set(range(C))
    assert torch.equal(drawn[10:20], random_classes(target[10:20], range(10, 20), C))


def test_class_value_agreement_beside_a_random_model() -> None:
    scores = torch.rand(2, 40, dtype=torch.float64) + 0.3
    controls = torch.rand(2, 40, dtype=torch.float64)
    controls[1] = scores[1]
    metric = ClassValueAgreement(2, 40)
    metric.update(scores, controls)
    found = metric.compute()
    torch.testing.assert_close(found.value, scores.mean(1))
    torch.testing.assert_close(found.control, controls.mean(1))
    assert found.p[0].item() == pytest.approx(wilcoxon(scores[0] - controls[0]).pvalue)
    assert found.p[1].item() == 1.0 and found.n == 40
    alone = ClassValueAgreement(2, 40)
    alone.update(scores)
    assert math.isnan(alone.compute().control[0]) and math.isnan(alone.compute().p[0])
