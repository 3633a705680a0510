"""Vectors read in class space, against products written out."""

from __future__ import annotations

import families
import pytest
import torch

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout import ClassEmbedding, read_vectors, vectors
from captum_classemb.vit import adapt

C, D, M, K = 9, 6, 20, 3


@pytest.mark.parametrize("chunk", [1 << 24, 4 * C])
def test_best_classes_and_vectors_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_CHUNK", chunk)
    embedding, rows = torch.randn(C, D), torch.randn(M, D)
    found = read_vectors(rows, embedding, K)
    logits = embedding @ rows.T
    cosine = torch.nn.functional.cosine_similarity(embedding[:, None], rows[None], dim=-1)
    torch.testing.assert_close(found.agreement, cosine.amax(1))
    assert torch.equal(found.classes, logits.T.topk(K).indices)
    torch.testing.assert_close(found.logits, logits.T.topk(K).values)
    assert torch.equal(found.vectors, logits.topk(K).indices)
    assert read_vectors(rows[:2], embedding, K).vectors.shape == (C, 2)


def test_readouts() -> None:
    decoder = torch.randn(50, 24, dtype=torch.float64)
    model = families.build("distilled")
    heads = (model.head.weight + model.head_dist.weight).detach() / 2
    found = read_vectors(decoder, adapt(model).readout)
    assert torch.equal(found.classes, (decoder @ heads.T).topk(5).indices)
    model = families.build("cls")
    text = torch.nn.functional.normalize(torch.randn(4, 7, dtype=torch.float64), dim=-1)
    by_text = ClassEmbedding.from_text_features(adapt(model).readout, text)
    directions = text @ model.head.weight.detach()
    found = read_vectors(decoder, by_text, 2)
    assert torch.equal(found.classes, (decoder @ directions.T).topk(2).indices)
    assert torch.equal(found.classes, read_vectors(decoder, directions, 2).classes)
    with pytest.raises(UnsupportedModelError, match="give such directions"):
        read_vectors(decoder, adapt(families.build("mlp head")).readout)


def test_refusals() -> None:
    embedding = torch.randn(C, D)
    with pytest.raises(InputError, match="best 10 of 9 classes and 20 vectors"):
        read_vectors(torch.randn(M, D), embedding, 10)
    with pytest.raises(InputError, match="rows of width 6"):
        read_vectors(torch.randn(M, D + 1), embedding)
