"""The tuned lens against autograd and its definition, and fitted readouts as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from readout.test_class_embedding import CLS, C, D, N, norm, one_head
from readout.test_probe import PLACE, check_derivatives, heads, hidden
from safetensors.torch import save_file
from torch import Tensor

from captum_classemb.errors import CheckpointError, InputError, OutputError
from captum_classemb.readout import (
    LinearProbe,
    Readout,
    Translator,
    TunedLens,
    load_readout,
    save_readout,
)
from captum_classemb.readout.training import TranslatorTrainer


def translator() -> Translator:
    generator = torch.Generator().manual_seed(9)
    matrix = torch.randn(D, D, generator=generator, dtype=torch.float64) / 3
    return Translator(matrix, torch.randn(D, generator=generator, dtype=torch.float64))


def lens(own: Readout) -> TunedLens:
    return TunedLens(own, {(1, "resid_post"): translator()})


@pytest.mark.parametrize("tokens", [CLS, slice(0, None)])
def test_a_translated_token_is_read_by_the_class_embedding(tokens: slice) -> None:
    own, x, t = one_head(tokens, norm(3)).readout, hidden(), translator()
    read = lens(own).at(1, "resid_post")
    moved = x + x @ t.matrix.T + t.bias
    target = torch.tensor([2, 0])
    torch.testing.assert_close(read.project(x), own.project(moved))
    torch.testing.assert_close(read.project(x, target), own.project(moved, target))
    torch.testing.assert_close(read(x[:, tokens]), own(moved[:, tokens]))
    assert read.reads == own.reads and read.num_classes == C


@pytest.mark.parametrize("tokens", [CLS, slice(0, None)])
def test_derivatives(tokens: slice) -> None:
    own = one_head(tokens, norm(3)).readout
    check_derivatives(lens(own).at(1, "resid_post"), hidden()[:, tokens])


def test_directions_of_tokens() -> None:
    own, x, t = one_head(CLS, norm(3)).readout, hidden(), translator()
    target = torch.tensor([2, 0])
    directions = lens(own).at(1, "resid_post").token_directions(x, target)
    there = own.token_directions(t(x), target)
    torch.testing.assert_close(directions, there + there @ t.matrix)


def test_asked_for_no_place_it_is_the_class_embedding() -> None:
    own, x = one_head(CLS, norm(3)).readout, hidden()
    torch.testing.assert_close(lens(own)(x[:, :1]), own(x[:, :1]))
    with pytest.raises(InputError, match="nothing for resid_post of block 0"):
        lens(own).at(0, "resid_post")


def divergence(own: Readout, x: Tensor, goal: Tensor) -> float:
    found, wanted = own.project(x).log_softmax(-1), own.project(goal).log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_training_finds_the_translator_that_made_the_tokens() -> None:
    """Where the last block's tokens are an affine map of earlier ones, nothing is left over."""
    own = one_head(CLS, norm(3)).readout
    made = translator()
    x = torch.randn(64, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    goal = made(x)
    trainer = TranslatorTrainer(own, D, learning_rate=0.03)
    first = trainer.step(x, goal)
    assert first == pytest.approx(divergence(own, x, goal), rel=1e-4)
    for step in range(300):
        trainer.slow_down(1.0 - step / 300)
        left = trainer.step(x, goal)
    assert left < 0.005 * first
    assert divergence(own, trainer.translator(x), goal) < 0.005 * first


def test_training_by_parts_of_a_batch_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    own = one_head(CLS, norm(3)).readout
    x = torch.randn(6, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trainers = []
    for at_once in (1 << 25, 2 * N * C):
        monkeypatch.setattr("captum_classemb.readout.training._LOGITS", at_once)
        trainer = TranslatorTrainer(own, D)
        losses = [trainer.step(x, translator()(x)) for _ in range(3)]
        trainers.append((trainer, losses))
    (one, whole), (two, parts) = trainers
    assert whole == pytest.approx(parts, rel=1e-5)
    torch.testing.assert_close(one.matrix, two.matrix, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("positions", [None, [3, 0]])
def test_a_probe_comes_back_from_its_file(tmp_path: Path, positions: list[int] | None) -> None:
    own = one_head(CLS, norm(3)).readout
    probe = LinearProbe(own, {PLACE: heads(2)}, 1, positions, normed=positions is None)
    save_readout(probe, tmp_path / "probe.safetensors")
    again = load_readout(tmp_path / "probe.safetensors", own)
    assert isinstance(again, LinearProbe) and again.places == [PLACE]
    assert (again.positions, again.normed) == (probe.positions, probe.normed)
    rows = hidden()[:, :1]
    assert torch.equal(again(rows), probe(rows))


def test_a_lens_comes_back_from_its_file(tmp_path: Path) -> None:
    own = one_head(CLS, norm(3)).readout
    save_readout(lens(own), tmp_path / "lens.safetensors")
    again = load_readout(tmp_path / "lens.safetensors", own)
    assert isinstance(again, TunedLens)
    x = hidden()
    expected = lens(own).at(1, "resid_post").project(x)
    assert torch.equal(again.at(1, "resid_post").project(x), expected)


def test_files_that_are_no_readout(tmp_path: Path) -> None:
    own = one_head(CLS, norm(3)).readout
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_readout(tmp_path / "nothing", own)
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_readout(tmp_path / "text", own)
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="holds no readout"):
        load_readout(tmp_path / "weights.safetensors", own)
    with pytest.raises(OutputError, match="cannot be written"):
        save_readout(lens(own), tmp_path / "no" / "folder")
