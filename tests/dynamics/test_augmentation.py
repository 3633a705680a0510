"""Augmentation: every image is a shifted or mirrored copy, the same for the same generator."""

from __future__ import annotations

import pytest
import torch

from captum_classemb.dynamics.augmentation import augment
from captum_classemb.errors import InputError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_image_is_shifted_and_some_are_mirrored() -> None:
    images = torch.rand(40, 2, 8, 8)
    found = augment(images, seeded(), flip=True)
    padded = torch.nn.functional.pad(images, (1,) * 4, mode="reflect")
    seen = set()
    for image, around in zip(found, padded, strict=True):
        for y in range(3):
            for x in range(3):
                shifted = around[:, y : y + 8, x : x + 8]
                seen |= {(y, x, 0)} if torch.equal(image, shifted) else set()
                seen |= {(y, x, 1)} if torch.equal(image, shifted.flip(-1)) else set()
    assert {key[0] for key in seen} == {key[1] for key in seen} == {0, 1, 2}
    assert {key[2] for key in seen} == {0, 1}
    assert len(seen) > 9


def test_no_shift_and_the_same_generator() -> None:
    images = torch.rand(6, 3, 8, 8)
    assert torch.equal(augment(images, seeded(), shift=0), images)
    assert torch.equal(augment(images, seeded()), augment(images, seeded()))


def test_too_wide_a_shift() -> None:
    with pytest.raises(InputError, match="8×8 cannot be shifted by 8"):
        augment(torch.zeros(1, 3, 8, 8), seeded(), shift=8)
