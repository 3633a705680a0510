"""Probes of a place against torch's own modules and autograd, for every way of pooling."""

from __future__ import annotations

import pytest
import torch
from oracle import frozen_at
from readout.test_class_embedding import CLS, B, C, D, N, distilled, norm, one_head
from torch import Tensor

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout import (
    ClassEmbedding,
    FunctionReadout,
    LinearProbe,
    ProbeHeads,
    Readout,
)
from captum_classemb.readout.probe import PlaceProbe

K = 3
PLACE = (2, "resid_post")


def heads(count: int) -> ProbeHeads:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(count, K, D, generator=generator, dtype=torch.float64)
    return ProbeHeads(weight, torch.randn(count, K, generator=generator, dtype=torch.float64))


def hidden() -> Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def check_derivatives(readout: Readout, rows: Tensor) -> None:
    """∂(g·logits)/∂rows against autograd; with σ frozen the logits are u·x and constants."""
    generator = torch.Generator().manual_seed(8)
    g = torch.randn(B, 2, readout.num_classes, generator=generator, dtype=torch.float64)
    gradients = []
    for weights in g.unbind(1):
        leaf = rows.clone().requires_grad_(True)
        gradients.append(torch.autograd.grad((readout(leaf) * weights).sum(), leaf)[0])
    expected = torch.stack(gradients, 2)
    torch.testing.assert_close(readout.vjp(rows, g), expected)
    summed = readout.vjp(rows, g, summed=True)
    torch.testing.assert_close(summed, expected.sum(1, keepdim=True))
    bias, pool = readout.constants(rows, g)
    whole = (readout.vjp(rows, g, frozen=True) * rows[:, :, None]).sum((1, 3)) + bias
    torch.testing.assert_close(whole, (readout(rows)[:, None] * g).sum(-1))
    assert pool is None


class Read:
    """What a probe should say, by torch's modules: W·LN(x) + b with each token's W and b."""

    def __init__(self, given: ProbeHeads, prefix: int) -> None:
        self.given, self.prefix = given, prefix

    def token(self, features: Tensor, n: int) -> Tensor:
        kind = 0 if n < self.prefix or not self.prefix else 1
        return features @ self.given.weight[kind].T + self.given.bias[kind]


def test_each_token_is_read_by_the_probe_of_its_kind() -> None:
    last = norm(3)
    own = one_head(CLS, last).readout
    probe = PlaceProbe(own, heads(2), prefix_tokens=2)
    read, x = Read(probe.heads, 2), hidden()
    expected = torch.stack([read.token(last(x[:, n]), n) for n in range(N)], 1)
    torch.testing.assert_close(probe.project(x), expected)
    target = torch.tensor([2, 0])
    wanted = expected.gather(-1, target[:, None, None].expand(-1, N, 1))[..., 0]
    torch.testing.assert_close(probe.project(x, target), wanted)
    torch.testing.assert_close(probe(x[:, :1]), expected[:, 0])
    assert probe.num_classes == K and probe.reads == CLS


def test_pooling_is_the_models() -> None:
    x, given = hidden(), heads(1)
    after = norm(3)
    averaged = PlaceProbe(one_head(slice(0, None), None, after).readout, given, prefix_tokens=0)
    read = Read(given, 0)
    torch.testing.assert_close(averaged(x), read.token(after(x.mean(1)), 0))
    before = PlaceProbe(one_head(slice(0, None), after).readout, given, prefix_tokens=0)
    torch.testing.assert_close(before(x), read.token(after(x), 0).mean(1))


def test_both_heads_of_a_distilled_model_become_the_probe_of_cls() -> None:
    case = distilled()
    probe = PlaceProbe(case.readout, heads(2), prefix_tokens=2)
    x = hidden()
    last = case.readout.token_norm
    assert last is not None
    read = Read(probe.heads, 2)
    expected = (read.token(last(x[:, 0]), 0) + read.token(last(x[:, 1]), 0)) / 2
    torch.testing.assert_close(probe(x[:, :2]), expected)


@pytest.mark.parametrize("tokens", [CLS, slice(1, None)])
def test_derivatives(tokens: slice) -> None:
    probe = PlaceProbe(one_head(tokens, norm(3)).readout, heads(2), prefix_tokens=1)
    check_derivatives(probe, hidden()[:, tokens])


def test_directions_of_tokens() -> None:
    last = norm(3)
    probe = PlaceProbe(one_head(CLS, last).readout, heads(2), prefix_tokens=1)
    x, target = hidden(), torch.tensor([2, 0])
    found = probe.token_directions(x, target)
    leaf = x.clone().requires_grad_(True)
    last.register_forward_hook(frozen_at(x))
    read, features = Read(probe.heads, 1), last(leaf)
    logits = torch.stack([read.token(features[:, n], n) for n in range(N)], 1)
    chosen = logits.gather(-1, target[:, None, None].expand(-1, N, 1))
    (expected,) = torch.autograd.grad(chosen.sum(), leaf)
    torch.testing.assert_close(found, expected)


def test_a_probe_for_each_position() -> None:
    last, x = norm(3), hidden()
    own = one_head(CLS, last).readout
    some = PlaceProbe(own, heads(2), prefix_tokens=1, positions=[4, 0])
    given = some.heads
    expected = last(x[:, 0]) @ given.weight[1].T + given.bias[1]
    torch.testing.assert_close(some(x[:, :1]), expected)
    with pytest.raises(InputError, match="token 1 has no probe: .* at 2 of 6 positions"):
        some.project(x)
    order = [5, 4, 3, 2, 1, 0]
    every = PlaceProbe(own, heads(N), prefix_tokens=1, positions=order)
    for place, n in enumerate(order):
        one = last(x[:, n]) @ every.heads.weight[place].T + every.heads.bias[place]
        torch.testing.assert_close(every.project(x)[:, n], one)
    averaged = PlaceProbe(one_head(slice(0, None), last).readout, heads(N), 0, order)
    with pytest.raises(UnsupportedModelError, match="fit one probe for all image tokens"):
        averaged(x)


def test_a_probe_of_raw_hidden_states() -> None:
    own, x = one_head(CLS, norm(3)).readout, hidden()
    probe = LinearProbe(own, {PLACE: heads(2)}, prefix_tokens=1, normed=False)
    torch.testing.assert_close(
        probe.at(*PLACE).project(x)[:, 3],
        x[:, 3] @ probe.heads[PLACE].weight[1].T + probe.heads[PLACE].bias[1],
    )


def test_places() -> None:
    own = one_head(CLS, norm(3)).readout
    first = ProbeHeads(heads(2).weight * 2.0, heads(2).bias)
    probe = LinearProbe(own, {(1, "resid_post"): first, PLACE: heads(2)}, prefix_tokens=1)
    x = hidden()
    assert probe.places == [(1, "resid_post"), PLACE]
    assert probe.at(2, "resid_pre") is probe.at(1, "resid_post")
    torch.testing.assert_close(probe.project(x), probe.at(*PLACE).project(x))
    torch.testing.assert_close(probe(x[:, :1]), probe.at(*PLACE)(x[:, :1]))
    assert not torch.allclose(probe.project(x), probe.at(1, "resid_post").project(x))
    with pytest.raises(InputError, match="nothing for attn_out of block 2: .* blocks 1 to 2"):
        probe.at(2, "attn_out")
    with pytest.raises(InputError, match="at least one"):
        LinearProbe(own, {}, prefix_tokens=1)


def test_what_does_not_fit_is_said() -> None:
    own = one_head(CLS, norm(3)).readout
    wide = ProbeHeads(torch.zeros(2, K, D + 1), torch.zeros(2, K))
    with pytest.raises(InputError, match=f"reads {D + 1} features and the model has {D}"):
        LinearProbe(own, {PLACE: wide}, prefix_tokens=1)
    with pytest.raises(UnsupportedModelError, match="FunctionReadout reads no single tokens"):
        LinearProbe(FunctionReadout(torch.sum, CLS, C), {PLACE: heads(2)}, prefix_tokens=1)


def test_nothing_of_the_model_is_registered_and_nothing_drawn() -> None:
    own = one_head(CLS, norm(3)).readout
    before = torch.get_rng_state()
    probe = LinearProbe(own, {PLACE: heads(2)}, prefix_tokens=1)
    probe(hidden()[:, :1])
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(probe.parameters()) and isinstance(own, ClassEmbedding)
