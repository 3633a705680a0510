"""Scenes: their masks are exact, their context says as much about the class as asked for."""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from captum_classemb.data import SCENE_CLASSES, Scenes, scenes
from captum_classemb.data._render import TEXTURES
from captum_classemb.errors import InputError, MissingExtraError

SPLITS = ("train", "val", "test")


def texture_table(dataset: Scenes) -> np.ndarray:
    """Counts, classes × texture families."""
    table = np.zeros((len(SCENE_CLASSES), len(TEXTURES)))
    for index in range(len(dataset)):
        scene = dataset.scene(index)
        table[scene.label, scene.texture.family] += 1
    return table


def test_item_is_image_label_mask_name_and_condition() -> None:
    image, label, mask, name, condition, _ = Scenes("val", length=30)[17]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert torch.equal(image, (image * 255).round() / 255)
    assert label == 7
    assert mask is not None and mask.shape == (64, 64) and mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) == {0, 1}
    assert name == "val_000017" and condition == ""


def test_item_depends_on_seed_split_and_index_only() -> None:
    image = Scenes("train", length=20, seed=3)[13].image
    torch.rand(5), np.random.rand(5)
    again = Scenes("train", length=50, seed=3)
    again[4]
    assert torch.equal(again[13].image, image)
    others = [
        Scenes("train", length=20, seed=4)[13],
        Scenes("val", length=20, seed=3)[13],
        Scenes("train", length=24, seed=3)[23],
    ]
    assert all(not torch.equal(other.image, image) for other in others)


def test_mask_is_where_the_image_changes_when_the_object_is_left_away() -> None:
    dataset = Scenes("test", length=200)
    for index in range(len(dataset)):
        scene = dataset.scene(index)
        with_object, mask = dataset.render(scene)
        context, empty = dataset.render(scene, with_object=False)
        assert torch.equal((with_object != context).any(0), mask == 1)
        assert not empty.any()


def test_object_is_of_reasonable_size_and_inside() -> None:
    masks = torch.stack([sample.mask for sample in Scenes("test", length=200)])
    share = masks.float().mean((1, 2))
    assert share.min() > 0.02 and share.max() < 0.3
    # A tail of ink at the border may happen; a digit that is cut off may not.
    border = masks.clone()
    border[:, 1:-1, 1:-1] = 0
    assert (border.sum((1, 2)) > 0).float().mean() < 0.05


def test_splits_share_no_scan_and_use_all() -> None:
    indices = {split: set(scenes.scan_indices(split).tolist()) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not indices[one] & indices[other]
    assert set.union(*indices.values()) == set(range(1797))


def test_a_scene_shows_a_scan_of_its_class_and_split() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for split in SPLITS:
        dataset = Scenes(split, length=60)
        mine = scenes.scan_indices(split)
        for index in range(len(dataset)):
            scene = dataset.scene(index)
            assert digits.target[mine[scene.digit.scan]] == scene.label == dataset.labels[index]


def test_context_is_uninformative_at_zero() -> None:
    table = texture_table(Scenes("train", context_correlation=0.0, length=4000))
    expected = table.sum(1, keepdims=True) / len(TEXTURES)
    statistic = ((table - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(0.999, df=90)


@pytest.mark.parametrize("correlation", [0.3, 0.8])
def test_context_correlation_is_as_asked_for(correlation: float) -> None:
    count = 2000
    table = texture_table(Scenes("train", context_correlation=correlation, length=count))
    expected = correlation + (1 - correlation) / len(TEXTURES)
    margin = 3.3 * np.sqrt(expected * (1 - expected) / count)
    assert abs(np.trace(table) / count - expected) < margin


def test_context_decides_the_class_at_one() -> None:
    table = texture_table(Scenes("val", context_correlation=1.0, length=100))
    assert np.array_equal(table, 10 * np.eye(10))


def test_textures_are_told_apart_by_their_spectra() -> None:
    """Each family, drawn in grey, lies nearer to its own mean spectrum than to any other's."""
    from captum_classemb.data._render import texture

    rng = np.random.default_rng(0)

    def spectrum(family: int) -> np.ndarray:
        tilt, phase = rng.uniform(-0.1, 0.1), tuple(rng.random(2))
        drawn = texture(family, 64, rng.uniform(9, 11), tilt, phase, int(rng.integers(2**31)))
        power = np.abs(np.fft.rfft2(drawn - drawn.mean())) ** 2
        smooth = sum(np.roll(power, (i, j), (0, 1)) for i in range(-2, 3) for j in range(-2, 3))
        return np.sqrt(smooth / smooth.sum()).ravel()

    families = range(len(TEXTURES))
    means = np.stack([np.mean([spectrum(f) for _ in range(20)], 0) for f in families])
    for family in families:
        for _ in range(10):
            assert np.argmin(np.linalg.norm(means - spectrum(family), axis=1)) == family


def test_transform_changes_the_image_only() -> None:
    plain, inverted = Scenes(length=3), Scenes(length=3, transform=lambda image: 1 - image)
    assert torch.equal(inverted[2].image, 1 - plain[2].image)
    assert torch.equal(inverted[2].mask, plain[2].mask)


def test_an_end_is_an_end() -> None:
    dataset = Scenes(length=3)
    assert len(list(dataset)) == 3
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "'dev'.*train, val, test"),
        ({"context_correlation": 1.5}, "1.5.*between 0 and 1"),
        ({"context_correlation": float("nan")}, "nan.*between 0 and 1"),
        ({"length": 0}, "0.*at least 1"),
        ({"seed": -1}, "-1.*not be negative"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scenes(**arguments)  # type: ignore[arg-type]


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes._scans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"captum-classemb\[scenes\]"):
        Scenes()
