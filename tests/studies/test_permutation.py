from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from captum_classemb.functional.permutation import (
    EXACT_BELOW,
    all_signs,
    count_hits,
    random_signs,
)
from captum_classemb.studies.class_and_context import ClassContextDifference, ShuffledTokens
from captum_classemb.studies.token_groups import membership


def sign_flip_test(
    differences: torch.Tensor,
    indices: Sequence[int] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> torch.Tensor:
    """Two-sided p-values of the mean of differences B×R, all images at once."""
    count = len(differences)
    exact = count < EXACT_BELOW
    signs = all_signs(count) if exact else random_signs(indices or range(count), draws, seed)
    differences = differences.double()
    drawn = differences.T @ signs.double()
    hits = count_hits(drawn, differences.sum(0), differences.abs().sum(0)).double()
    return hits / drawn.shape[1] if exact else (1 + hits) / (1 + draws)


def one_token_each(differences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and members of images with one class and one context token that differ so much."""
    values = torch.stack([differences.T, torch.zeros_like(differences.T)], -1)
    patches = torch.tensor([[1, 0]]).expand(len(differences), -1)
    return values, membership(len(differences), 2, 0, patches)


def test_below_13_images_every_assignment_is_tried() -> None:
    differences = torch.randn(7, 3, dtype=torch.float64)
    p = sign_flip_test(differences)
    observed = differences.sum(0).abs()
    hits = torch.zeros(3)
    for signs in itertools.product((1, -1), repeat=7):
        drawn = (torch.tensor(signs)[:, None] * differences).sum(0).abs()
        hits += drawn >= observed - 1e-12
    torch.testing.assert_close(p, hits.double() / 2**7)


def test_the_largest_possible_effect_has_the_smallest_possible_p() -> None:
    assert sign_flip_test(torch.ones(12, 1)).item() == 2 / 2**12
    strong = sign_flip_test(torch.ones(40, 1), draws=10_000).item()
    assert strong == 1 / 10_001
    assert sign_flip_test(torch.zeros(40, 1)).item() == 1.0


def test_from_13_images_on_random_draws_approach_the_exact_share() -> None:
    differences = torch.randn(13, 1, dtype=torch.float64) + 0.3
    p = sign_flip_test(differences, draws=20_000).item()
    all_bits = (torch.arange(2**13)[:, None] >> torch.arange(13)) & 1
    drawn = ((1 - 2 * all_bits).double() @ differences).abs()
    exact = (drawn >= differences.sum().abs() - 1e-12).double().mean().item()
    assert p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 20_000) ** 0.5)


def test_p_values_are_uniform_without_an_effect() -> None:
    differences = torch.randn(30, 400, dtype=torch.float64)
    p = sign_flip_test(differences, draws=2_000)
    for level in (0.1, 0.5, 0.9):
        share = (p <= level).double().mean().item()
        assert share == pytest.approx(level, abs=4 * (level * (1 - level) / 400) ** 0.5)


def test_signs_follow_the_image_and_the_seed_alone() -> None:
    signs = random_signs([5, 9, 5], 1000, seed=1)
    assert torch.equal(signs[0], signs[2])
    assert set(signs.flatten().tolist()) == {-1, 1}
    assert not torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], random_signs([5], 1000, seed=2)[0])
    assert abs(random_signs(range(50), 1000).double().mean().item()) < 0.02


@pytest.mark.parametrize("images", [1, 12, 13, 40])
def test_streamed_is_the_test_on_all_differences(images: int) -> None:
    differences = torch.randn(images, 2, dtype=torch.float64) + 0.2
    indices = list(range(3, 3 + images))
    values, members = one_token_each(differences)
    metric = ClassContextDifference(rows=2, draws=10_000, seed=4)
    for start in range(0, images, 7):
        part = slice(start, start + 7)
        metric.update(values[:, part], members[:, part], indices[part])
    found = metric.compute()
    torch.testing.assert_close(found.p, sign_flip_test(differences, indices, 10_000, seed=4))
    torch.testing.assert_close(found.value, differences.mean(0))
    torch.testing.assert_close(found.means, torch.stack([found.value, torch.zeros(2).double()]))
    assert found.n == images


def test_the_image_is_the_unit() -> None:
    """Means over each image's tokens first; images without one kind of token do not count."""
    values = torch.tensor([[[3.0, 1.0, 0.0], [5.0, 5.0, 5.0]]])
    members = membership(2, 3, 0, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    metric = ClassContextDifference(rows=1)
    metric.update(values, members, [0, 1])
    found = metric.compute()
    assert (found.value.item(), found.n, found.p.item()) == (2.0, 1, 1.0)


def test_without_images_there_is_no_number() -> None:
    metric = ClassContextDifference(rows=1)
    metric.update(torch.zeros(1, 1, 2), membership(1, 2, 0), [0])
    found = metric.compute()
    assert found.n == 0 and found.p.isnan().all() and found.value.isnan().all()


def test_shuffled_tokens_are_the_published_test() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 6, (2, 5, 40), generator=generator)
    patches = torch.randint(0, 2, (5, 40), generator=generator)
    # The second quantity is higher on class tokens, by little.
    levels[1] += (patches == 1) & (torch.rand(5, 40, generator=generator) < 0.25)
    members = membership(5, 40, 0, patches)
    metric = ShuffledTokens(rows=2, levels=7, scale=-0.5, shift=1.0)
    for images in (slice(0, 2), slice(2, 5)):
        metric.update(levels[:, images], members[:, images], range(5)[images])
    found = metric.compute()
    values = 1.0 - 0.5 * levels.double()
    for row in range(2):
        ours, others = values[row][patches == 1], values[row][patches == 0]
        torch.testing.assert_close(found.means[:, row], torch.stack([ours.mean(), others.mean()]))
        observed = ours.mean() - others.mean()
        torch.testing.assert_close(found.value[row], observed)
        together = torch.cat([ours, others])
        larger = 0
        for _ in range(4000):
            shuffled = together[torch.randperm(200, generator=generator)]
            difference = shuffled[: len(ours)].mean() - shuffled[len(ours) :].mean()
            larger += bool(difference > observed + 1e-12)
        share = larger / 4000
        error = 4 * (max(share * (1 - share), 0.01) / 300) ** 0.5
        assert found.p[row].item() == pytest.approx(share, abs=error)
    assert found.n == 200
    rising = ShuffledTokens(rows=1, levels=2)
    rising.update((patches == 1)[None], members, range(5))
    assert rising.compute().p.item() == 0.0
    rising.update(torch.zeros(1, 1, 3, dtype=torch.bool), membership(1, 3, 0), [0])
    assert ShuffledTokens(rows=1, levels=2).compute().p.isnan().all()
