"""A readout through any function: derivatives by autograd through it alone, any leading blocks."""

from __future__ import annotations

import pytest
import torch
from readout.builders import drawn
from readout.test_class_embedding import B, C, D, K, tokens
from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.readout import FunctionReadout


@pytest.fixture
def readout() -> FunctionReadout:
    """Max pooling before a head with a hidden layer."""
    head = drawn(nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)))
    return FunctionReadout(lambda x: head(x.amax(-2)), slice(1, None), C)


def test_vjp_is_the_gradient(readout: FunctionReadout) -> None:
    x, g = tokens()[:, readout.reads], torch.randn(B, K, C, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(readout, x)  # B×C×B×Q×D
    own = torch.stack([jacobian[b, :, b] for b in range(B)])
    expected = torch.einsum("bkc,bcqd->bqkd", g, own)
    assert torch.allclose(readout.vjp(x, g), expected, rtol=1e-11, atol=1e-13)
    summed = readout.vjp(x, g, summed=True)
    assert torch.allclose(summed, expected.sum(1, keepdim=True), rtol=1e-11, atol=1e-13)


def test_blocks_are_a_dimension_in_front(readout: FunctionReadout) -> None:
    rows = torch.stack([tokens(7), tokens(8), tokens(9)])[:, :, readout.reads]
    g = torch.randn(3, B, K, C, dtype=torch.float64)
    assert torch.allclose(readout(rows), torch.stack([readout(x) for x in rows]))
    alone = [readout.vjp(x, one) for x, one in zip(rows, g, strict=True)]
    assert torch.allclose(readout.vjp(rows, g), torch.stack(alone), rtol=1e-11, atol=1e-13)


def test_a_token_is_read_alone(readout: FunctionReadout) -> None:
    x, target = tokens(), torch.tensor([4, 1])
    expected = torch.stack([readout(x[:, n : n + 1]) for n in range(x.shape[1])], 1)
    assert torch.allclose(readout.project(x), expected, rtol=1e-11)
    picked = expected[torch.arange(B), :, target]
    assert torch.allclose(readout.project(x, target), picked, rtol=1e-11)


def test_it_has_no_ledger(readout: FunctionReadout) -> None:
    x, g = tokens()[:, readout.reads], torch.randn(B, K, C, dtype=torch.float64)
    for run in (lambda: readout.vjp(x, g, frozen=True), lambda: readout.constants(x, g)):
        with pytest.raises(UnsupportedModelError, match="FunctionReadout is not affine"):
            run()


def test_the_model_keeps_no_gradient(readout: FunctionReadout) -> None:
    x: Tensor = tokens()[:, readout.reads]
    with torch.no_grad():
        found = readout.vjp(x, torch.randn(B, K, C, dtype=torch.float64))
    assert not found.requires_grad and x.grad is None
