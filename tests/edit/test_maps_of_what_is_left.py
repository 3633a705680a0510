"""Maps within token removal: those of the model that never had the other patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, images
from torch import Tensor

from captum_classemb.attr import (
    AllPathImportance,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.attr.baselines import AttentionRollout, CheferRelevance
from captum_classemb.edit import ablate_heads, remove_tokens
from captum_classemb.errors import InputError
from captum_classemb.vit import adapt

METHODS: list[Any] = [
    PatchImportance,
    AllPathImportance,
    MemoryPatchImportance,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    AttentionRollout,
    CheferRelevance,
]
TARGET = torch.tensor([2, 5])


def left() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(16, generator=generator)[:9] for _ in range(2)])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_patches_that_are_gone_score_nothing(method: Any) -> None:
    vit, pixels, keep = adapt(build("cls")), images("cls"), left()
    whole = method(vit).attribute_patches(pixels, TARGET)
    with remove_tokens(vit, keep):
        found = method(vit).attribute_patches(pixels, TARGET)
        spread = method(vit).attribute(pixels, TARGET)
    assert found.shape == whole.shape
    flat = found.flatten(-2)
    gone = torch.ones(2, 16, dtype=torch.bool).scatter_(1, keep, False)
    places = gone.view(2, *[1] * (flat.dim() - 2), 16).expand(flat.shape)
    assert not flat[places].any()
    assert flat[~places].abs().max() > 0
    assert spread.shape == pixels.shape
    # What the model sees is left does not depend on pixels of the others.
    other = pixels + gone.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with remove_tokens(vit, keep):
        again = method(vit).attribute_patches(other, TARGET)
    torch.testing.assert_close(again, found)
    torch.testing.assert_close(method(vit).attribute_patches(pixels, TARGET), whole)


@pytest.mark.parametrize("name", ["cls", "mean, fc_norm", "relative positions", "beit"])
def test_the_ledger_adds_up_to_what_is_left(name: str) -> None:
    vit, pixels = adapt(build(name)), images(name)
    with torch.no_grad(), remove_tokens(vit, left()):
        logits = vit(pixels).gather(1, TARGET[:, None])[:, 0]
        ledger = MemoryPatchImportance(vit).ledger(pixels, TARGET)
    torch.testing.assert_close(ledger.total, logits)


def test_other_edits_are_still_refused() -> None:
    vit, pixels = adapt(build("cls")), images("cls")
    uneven = torch.arange(16)[None] < torch.tensor([[5], [9]])
    for edit in (ablate_heads(vit, {0: [1]}), remove_tokens(vit, uneven)):
        with edit, pytest.raises(InputError, match="leave the edit first"):
            PatchImportance(vit).attribute(pixels, TARGET)
