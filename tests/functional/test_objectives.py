"""Derivatives of the scores with respect to the logits, by hand and by autograd."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_classemb.errors import InputError
from captum_classemb.functional.objectives import (
    Objective,
    check_objective,
    logit_gradient,
    paper_weights,
    runner_up,
)

SCORES = {
    "logit": lambda z: z,
    "log_probability": lambda z: z.log_softmax(-1),
    # log p − log(1 − p), the others summed one by one.
    "log_odds": lambda z: (
        z
        - torch.stack(
            [
                z[..., [k for k in range(z.shape[-1]) if k != c]].logsumexp(-1)
                for c in range(z.shape[-1])
            ],
            -1,
        )
    ),
    # The published code hands softmax(z) to a cross-entropy that applies its own softmax.
    "paper": lambda z: z.softmax(-1).log_softmax(-1),
}


def by_autograd(z: Tensor, target: Tensor, objective: str) -> Tensor:
    """∂score/∂z for each class of B×K: B×K×C."""
    found = []
    for classes in target.unbind(1):
        leaf = z.clone().requires_grad_(True)
        score = SCORES[objective](leaf).gather(1, classes[:, None]).sum()
        found.append(torch.autograd.grad(score, leaf)[0])
    return torch.stack(found, 1)


def test_by_hand() -> None:
    z, target = torch.zeros(1, 2), torch.tensor([[0, 1]])
    assert logit_gradient(z, target, "logit").tolist() == [[[1.0, 0.0], [0.0, 1.0]]]
    half = [[[0.5, -0.5], [-0.5, 0.5]]]
    assert logit_gradient(z, target, "log_probability").tolist() == half
    assert logit_gradient(z, target, "log_odds").tolist() == [[[1.0, -1.0], [-1.0, 1.0]]]
    # p = s = (½, ½), so r = 0 and the gradient is p_c times the log-probability's.
    quarter = [[[0.25, -0.25], [-0.25, 0.25]]]
    assert logit_gradient(z, target, "paper").tolist() == quarter


def test_paper_weights_by_hand() -> None:
    z = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()  # p = (¾, ¼)
    p, r = paper_weights(z)
    s = 1 / (1 + torch.tensor(-0.5).double().exp())
    assert torch.allclose(p, torch.tensor([[0.75, 0.25]]).double())
    assert torch.allclose(r, torch.stack([3 * (2 * s - 1), 3 * (1 - 2 * s)])[None] / 16)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_against_autograd(objective: Objective) -> None:
    z = torch.randn(4, 9, dtype=torch.float64) * 3
    target = torch.tensor([[0, 2], [8, 0], [3, 3], [3, 7]])
    expected = by_autograd(z, target, objective)
    assert expected.shape == (4, 2, 9)
    assert torch.allclose(logit_gradient(z, target, objective), expected, rtol=1e-11, atol=1e-14)
    # Logits of several blocks, and the same classes for all of them.
    blocks = torch.stack([z, z.flip(0)])
    by_block = torch.stack([by_autograd(one, target, objective) for one in blocks])
    assert torch.allclose(
        logit_gradient(blocks, target, objective), by_block, rtol=1e-11, atol=1e-14
    )


@pytest.mark.parametrize("objective", get_args(Objective))
def test_another_class_is_set_against_the_target(objective: Objective) -> None:
    z, target, other = torch.randn(2, 4), torch.tensor([[0], [3]]), torch.tensor([[2], [1]])
    expected = [[[1.0, 0.0, -1.0, 0.0]], [[0.0, -1.0, 0.0, 1.0]]]
    assert logit_gradient(z, target, objective, other).tolist() == expected


@pytest.mark.parametrize("objective", get_args(Objective))
def test_one_class_is_explained_by_its_logit(objective: Objective) -> None:
    z, target = torch.randn(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    assert logit_gradient(z, target, objective).tolist() == [[[1.0]], [[1.0]]]


def test_a_certain_prediction_keeps_its_digits() -> None:
    """1 − p_c = e^{-40}: in float32 p_c is 1, and e_c − p would be 0."""
    z, target = torch.tensor([[40.0, 0.0, -1.0]]), torch.tensor([[0]])
    expected = by_autograd(z.double(), target, "log_odds")
    assert torch.allclose(logit_gradient(z, target, "log_odds").double(), expected, rtol=1e-6)
    rest = torch.tensor([0.0, -1.0]).double().exp().sum() * torch.tensor(-40.0).double().exp()
    gradient = logit_gradient(z, target, "log_probability").double()
    assert torch.allclose(gradient, expected * rest, rtol=1e-5, atol=0)


def test_the_runner_up() -> None:
    z = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    assert runner_up(z, torch.tensor([[1, 0], [2, 0]])).tolist() == [[2, 1], [0, 2]]


@settings(max_examples=60, deadline=None)
@given(
    z=st.lists(st.floats(-700, 700), min_size=2, max_size=6),
    place=st.integers(0, 5),
    objective=st.sampled_from(["log_probability", "paper"]),
)
def test_finite_and_blind_to_a_shift_of_all_logits(
    z: list[float], place: int, objective: Objective
) -> None:
    logits, target = torch.tensor([z], dtype=torch.float64), torch.tensor([[place % len(z)]])
    gradient = logit_gradient(logits, target, objective)
    assert torch.isfinite(gradient).all()
    assert abs(float(gradient.sum())) < 1e-12
    assert float(gradient[0, 0, target]) >= 0.0
    assert torch.allclose(gradient, by_autograd(logits, target, objective), rtol=1e-9, atol=1e-12)


def test_an_unknown_objective_is_refused() -> None:
    names = "'nll' is none of 'paper', 'log_probability', 'logit', 'log_odds'"
    with pytest.raises(InputError, match=names):
        logit_gradient(torch.zeros(1, 2), torch.tensor([[0]]), "nll")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'paper' is none of 'logit'"):
        check_objective("paper", ("logit",))
