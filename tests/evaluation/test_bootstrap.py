"""Bootstrap intervals: closed forms, coverage, and pairing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.evaluation import bootstrap
from captum_classemb.evaluation.bootstrap import bootstrap_mean, paired_difference

values = st.lists(st.floats(-10, 10, allow_nan=False), min_size=1, max_size=30)


@given(values)
def test_the_interval_holds_between_the_extremes(numbers: list[float]) -> None:
    found = bootstrap_mean(torch.tensor(numbers, dtype=torch.float64), resamples=200)
    assert found.mean == pytest.approx(sum(numbers) / len(numbers), abs=1e-9)
    slack = 1e-9
    assert min(numbers) - slack <= found.low <= found.high <= max(numbers) + slack
    assert found.images == len(numbers)


def test_the_width_is_that_of_the_normal_approximation() -> None:
    sample = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = bootstrap_mean(sample, resamples=4000)
    half = 1.96 * sample.std().item() / 20
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    narrow = bootstrap_mean(sample, resamples=4000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.1)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        found = bootstrap_mean(torch.randn(60, generator=generator), resamples=300)
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = torch.arange(7.0)
    whole = bootstrap_mean(sample, resamples=50)
    monkeypatch.setattr(bootstrap, "_CHUNK", 21)
    assert bootstrap_mean(sample, resamples=50) == whole
    assert bootstrap_mean(sample, resamples=50, seed=1) != whole


def test_pairing_removes_what_the_images_share() -> None:
    generator = torch.Generator().manual_seed(1)
    difficulty = torch.randn(200, generator=generator) * 10
    better = difficulty + 0.1 + 0.01 * torch.randn(200, generator=generator)
    found = paired_difference(better, difficulty)
    assert 0.05 < found.low < found.high < 0.15
    mirrored = paired_difference(difficulty, better)
    assert mirrored.mean == pytest.approx(-found.mean)
    assert mirrored.low == pytest.approx(-found.high)


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match="one value an image"):
        bootstrap_mean(torch.zeros(0))
    with pytest.raises(InputError, match="one value an image"):
        bootstrap_mean(torch.zeros(2, 2))
    with pytest.raises(InputError, match="level"):
        bootstrap_mean(torch.zeros(2), level=1.0)
    with pytest.raises(NonFiniteError):
        bootstrap_mean(torch.tensor([0.0, float("nan")]))
    with pytest.raises(InputError, match="same images"):
        paired_difference(torch.zeros(2), torch.zeros(3))
