"""Rank correlation against scipy, and a check that tells learnt maps from edge detectors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from drawn import small_timm
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from captum_classemb.attr import ClassEmbeddingGradient
from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.evaluation.sanity import randomisation_check, randomised
from captum_classemb.functional.correlation import rank_correlation

maps = hnp.arrays(np.float64, (3, 4), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3.0]))


@given(maps, maps)
def test_rank_correlation_is_that_of_scipy(first: np.ndarray, second: np.ndarray) -> None:
    stats = pytest.importorskip("scipy.stats")
    found = rank_correlation(torch.from_numpy(first), torch.from_numpy(second)).item()
    if len(np.unique(first)) == 1 or len(np.unique(second)) == 1:
        assert found == 0
    else:
        expected = stats.spearmanr(first.ravel(), second.ravel()).statistic
        assert found == pytest.approx(expected, abs=1e-12)


def test_leading_dimensions_are_maps() -> None:
    a, b = torch.rand(2, 5, 3, 3), torch.rand(2, 5, 3, 3)
    assert rank_correlation(a, b)[1, 4] == rank_correlation(a[1, 4], b[1, 4])
    assert torch.equal(rank_correlation(a, a * 7 - 3), torch.ones(2, 5, dtype=torch.float64))
    with pytest.raises(InputError, match="one shape"):
        rank_correlation(a, b[:1])
    with pytest.raises(NonFiniteError):
        rank_correlation(a / 0, b)


def model() -> nn.Module:
    torch.manual_seed(0)
    vit = small_timm(num_classes=4)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.eval()


def test_randomisation_shuffles_a_copy() -> None:
    vit = model()
    before = copy.deepcopy(vit.state_dict())
    other = randomised(vit)
    for name, value in vit.state_dict().items():
        assert torch.equal(value, before[name])
        shuffled = other.state_dict()[name]
        assert torch.equal(shuffled.flatten().sort().values, value.flatten().sort().values)
        assert value.numel() == 1 or not torch.equal(shuffled, value)
    assert torch.equal(
        randomised(vit).state_dict()["head.weight"], other.state_dict()["head.weight"]
    )


def test_an_edge_detector_is_found_out_and_a_map_of_the_model_is_not() -> None:
    vit = model()
    images, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 4

    def edges(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
        return inputs.std(1)

    def importance(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
        return ClassEmbeddingGradient(model).attribute_patches(inputs, target).sum((1, 2))

    assert (randomisation_check(edges, vit, images, target) == 1).all()
    assert randomisation_check(importance, vit, images, target).mean() < 0.5
