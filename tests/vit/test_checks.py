"""Identities: what holds passes, and what does not is named with its block and image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_classemb.errors import InputError, NonFiniteError, UnsupportedModelError
from captum_classemb.vit.checks import Checks


class Model(nn.Identity):
    """Something that is named in messages."""


BLOCKS = (2, 5, 7)
B, Q, D = 2, 3, 4


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """The same numbers twice, the second a copy that a test may spoil."""
    real = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return real, real.clone()


def finished(
    what: str, blocks: Any, rebuilt: Tensor, real: Tensor, tolerance: float = 1e-3
) -> None:
    checks = Checks(Model(), tolerance)
    checks.equal("logits", (), *pair(B, 5))
    checks.equal(what, blocks, rebuilt, real)
    checks.equal("logits", (), *pair(B, 5))
    checks.finish()


def test_nothing_to_compare() -> None:
    Checks(Model(), 1e-3).finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_holds_passes(dtype: torch.dtype) -> None:
    rebuilt, real = pair(3, B, Q, D)
    finished("outputs", BLOCKS, rebuilt.to(dtype), real.to(dtype))
    finished("outputs", BLOCKS, torch.zeros(3, B, Q, D), torch.zeros(3, B, Q, D), 0.0)


def test_rounding_is_measured_against_the_largest_entry_of_its_own_block_and_image() -> None:
    rebuilt, real = pair(3, B, Q, D)
    off = 0.9e-3 * real.abs().amax((2, 3))
    rebuilt[:, :, 0, 0] += off
    finished("outputs", BLOCKS, rebuilt, real)
    rebuilt[1, 1, 0, 0] += 0.2e-3 * real[1, 1].abs().max()
    # A block with large entries makes no room for the others.
    rebuilt[0] *= 1e6
    real[0] *= 1e6
    with pytest.raises(UnsupportedModelError, match="outputs of block 5 differ"):
        finished("outputs", BLOCKS, rebuilt, real)


@pytest.mark.parametrize(("block", "image"), [(0, 0), (1, 1), (2, 0)])
def test_block_and_image_are_named(block: int, image: int) -> None:
    rebuilt, real = pair(3, B, Q, D)
    rebuilt[block, image, 1, 2] += 1.0
    size = 1.0 / float(real[block, image].abs().max())
    message = (
        f"Model does not compute what its structure says: attention outputs of block "
        f"{BLOCKS[block]} differ from the reconstruction by {size:.1e} of the largest entry for "
        f"image {image}"
    )
    with pytest.raises(UnsupportedModelError, match=message.replace("+", r"\+")):
        finished("attention outputs", BLOCKS, rebuilt, real)


def test_an_identity_of_no_block_names_the_image() -> None:
    rebuilt, real = pair(B, 5)
    rebuilt[1, 0] += 1.0
    with pytest.raises(UnsupportedModelError, match="embeddings differ .* for image 1"):
        finished("embeddings", (), rebuilt, real)


def test_the_first_that_fails_is_named() -> None:
    checks = Checks(Model(), 1e-3)
    for what in ("outputs", "logits"):
        rebuilt, real = pair(B, 5)
        checks.equal(what, (), rebuilt + 1.0, real)
    with pytest.raises(UnsupportedModelError, match=": outputs differ"):
        checks.finish()


def test_something_where_nothing_is_expected() -> None:
    with pytest.raises(UnsupportedModelError, match="outputs of block 7 differ"):
        rebuilt, real = torch.zeros(3, B, Q, D), torch.zeros(3, B, Q, D)
        rebuilt[2] = 1e-30
        finished("outputs", BLOCKS, rebuilt, real)


SPOILED = {
    "NaN rebuilt": (float("nan"), None),
    "NaN in the model": (None, float("nan")),
    "infinite rebuilt": (float("inf"), None),
    "both infinite": (float("inf"), float("inf")),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_finite_is_named_as_such(name: str) -> None:
    """It is greater than no tolerance, and must not be hidden by what is."""
    rebuilt, real = pair(3, B, Q, D)
    for tensor, value in zip((rebuilt, real), SPOILED[name], strict=True):
        if value is not None:
            tensor[1, 1, 2, 0] = value
    message = "outputs of block 5 of Model hold NaN or infinity for image 1"
    with pytest.raises(NonFiniteError, match=message):
        finished("outputs", BLOCKS, rebuilt, real)


def test_conditions() -> None:
    checks = Checks(Model(), 1e-3)
    rebuilt, real = pair(B, 5)
    checks.equal("logits", (), rebuilt + 1.0, real)
    checks.require(torch.tensor(True), lambda: InputError("this holds"))
    checks.require(torch.tensor(False), lambda: InputError("this does not"))
    with pytest.raises(InputError, match="this does not"):
        checks.finish()
