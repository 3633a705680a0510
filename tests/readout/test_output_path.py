"""Steps in a row: derivatives against autograd, and the affine map that frozen norms leave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from readout.builders import B, D, K, Q, drawn, each, rows
from timm.layers import RmsNorm
from torch import Tensor, nn

from captum_classemb.readout import Gate, LayerScale, Linear, Norm, OutputPath, Step
from captum_classemb.readout.output_path import along


def a_path(x: Tensor, order: str) -> tuple[OutputPath, Callable[[Tensor], Tensor]]:
    """The steps named by letters, and the same map written with torch's modules."""
    linear, norm, inner = drawn(nn.Linear(D, D)), drawn(nn.LayerNorm(D)), drawn(RmsNorm(D))
    gamma, gate = rows(D), rows()
    steps: dict[str, tuple[Step, Callable[[Tensor], Tensor]]] = {
        "i": (Norm(inner), inner),
        "g": (Gate(gate), lambda z: z * gate),
        "l": (Linear(linear), linear),
        "s": (LayerScale(gamma), lambda z: z * gamma),
        "n": (Norm(norm), norm),
    }

    def run(z: Tensor) -> Tensor:
        for letter in order:
            z = steps[letter][1](z)
        return z

    return OutputPath.of([steps[letter][0] for letter in order], x), run


ORDERS = ["l", "ls", "ln", "igls", "igln"]


@pytest.mark.parametrize("order", ORDERS)
def test_derivatives(order: str) -> None:
    x = rows()
    path, run = a_path(x, order)
    assert torch.allclose(path.output, run(x).detach(), rtol=1e-11)
    c, t = rows(B, Q, K, D), rows(B, Q, K, D)
    assert torch.allclose(path.vjp(c), each(run, x, c, "vjp"), rtol=1e-9, atol=1e-10)
    assert torch.allclose(path.jvp(t), each(run, x, t, "jvp"), rtol=1e-9, atol=1e-10)
    assert path.uniform == (order in ("l", "ls"))


@pytest.mark.parametrize("order", ORDERS)
def test_with_frozen_norms_it_is_affine(order: str) -> None:
    """u·output = (Jᵀu)·x + what the biases add."""
    x, u = rows(), rows(B, Q, K, D)
    path, _ = a_path(x, order)
    back = path.vjp(u, frozen=True)
    total = (back * x[..., None, :]).sum((1, 3)) + path.biases(u)
    assert torch.allclose(total, (u * path.output[..., None, :]).sum((1, 3)), rtol=1e-9)
    t = rows(B, Q, K, D)
    one, other = (path.jvp(t, frozen=True) * u).sum(), (back * t).sum()
    assert torch.isclose(one, other, rtol=1e-9)


def test_what_no_derivative_reads_may_be_missing() -> None:
    x, c = rows(), rows(B, Q, K, D)
    path, _ = a_path(x, "ls")
    empty = OutputPath(path.steps, (x[..., :0], x[..., :0]), path.output)
    assert torch.equal(empty.vjp(c), path.vjp(c))
    assert torch.equal(empty.biases(c), path.biases(c))


def test_where_the_published_code_reads() -> None:
    path, _ = a_path(rows(), "igls")
    before = path.before_layer_scale()
    assert len(before.steps) == 3
    assert torch.equal(before.output, path.inputs[3])
    path, _ = a_path(rows(), "ln")
    assert path.before_layer_scale() is path, "a post-norm is read after it"


def test_since() -> None:
    path, _ = a_path(rows(), "igls")
    late = path.since(Linear)
    assert [type(step) for step in late.steps] == [Linear, LayerScale]
    assert torch.equal(late.inputs[0], path.inputs[2])


def test_an_offset_along_cotangents() -> None:
    offset, c = rows(D), rows(B, Q, K, D)
    expected = torch.einsum("d,bqkd->bk", offset, c)
    assert torch.allclose(along(offset, c), expected)
    by_block = torch.stack([offset, 2.0 * offset])
    blocks = torch.stack([c, c])
    assert torch.allclose(along(by_block, blocks), torch.stack([expected, 2.0 * expected]))
    assert torch.equal(along(None, c), torch.zeros_like(expected))
