"""The evaluation itself, where the truth is known: scenes with exact object masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_classemb.evaluation import MaskLocalisation, RemovalCurves
from captum_classemb.evaluation.removal_order import patch_sums
from captum_classemb.models import demo_vit


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, Tensor, Tensor]:
    pytest.importorskip("sklearn")
    from captum_classemb.data.scenes import Scenes

    dataset = Scenes("test", context_correlation=0.0, length=40)
    samples = [dataset[i] for i in range(len(dataset))]
    images = torch.stack([(s.image - 0.5) / 0.5 for s in samples])
    masks = torch.stack([s.mask == 1 for s in samples if s.mask is not None])
    return images, torch.tensor([s.label for s in samples]), masks


def areas(images: Tensor, labels: Tensor, maps: Tensor) -> dict[str, float]:
    metric = RemovalCurves(steps=16)
    metric.update(demo_vit(), images, maps, labels)
    return {name: float(value) for name, value in metric.compute().items()}


def test_an_oracle_scores_near_the_top_its_reverse_near_the_bottom_and_chance_between(
    scenes: tuple[Tensor, Tensor, Tensor],
) -> None:
    images, labels, masks = scenes
    oracle = patch_sums(masks[:, None].float(), (8, 8))
    generator = torch.Generator().manual_seed(0)
    best, worst = (areas(images, labels, m) for m in (oracle, -oracle))
    # Several random orders of each image: one alone says little about chance.
    many, often = images.repeat(5, 1, 1, 1), labels.repeat(5)
    middle = areas(many, often, torch.rand(len(many), 8, 8, generator=generator))
    # Context taken out first leaves the digit to the end; the digit taken out first, nothing.
    assert best["accuracy/negative"] > 0.75 and best["accuracy/positive"] < 0.25
    assert best["accuracy/gap"] > 0.55 and worst["accuracy/gap"] < -0.55
    assert abs(middle["accuracy/gap"]) < 0.12
    assert worst["probability/gap"] == pytest.approx(-best["probability/gap"], abs=0.05)


def test_masks_are_found_by_the_oracle_alone(scenes: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, masks = scenes
    scores = {}
    for name, maps in (("oracle", masks.float()), ("reverse", (~masks).float())):
        metric = MaskLocalisation()
        metric.update(maps[:, None], masks)
        scores[name] = {key: float(value) for key, value in metric.compute().items()}
    assert set(scores["oracle"].values()) == {1.0}
    assert scores["reverse"]["energy"] == 0.0 and scores["reverse"]["mean_iou"] == 0.0
