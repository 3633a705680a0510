from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import create_transform

from captum_classemb.data import Preprocess, boxes_to_mask, patch_mask
from captum_classemb.errors import DataError, InputError


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (64, 64), (37, 41)])
@pytest.mark.parametrize("target", [(32, 32), (32, 48)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_crop_is_timms_evaluation_transform(
    size: tuple[int, int], target: tuple[int, int], crop_mode: str
) -> None:
    config = {
        "input_size": (3, *target),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": crop_mode,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    image = noise(*size)
    ours, _, _ = Preprocess.from_config(config)(image)
    theirs = create_transform(**config, is_training=False)(image)
    torch.testing.assert_close(ours, theirs)


@given(
    height=st.integers(20, 90),
    width=st.integers(20, 90),
    mode=st.sampled_from(["crop", "squash"]),
    corner=st.tuples(st.floats(0, 0.6), st.floats(0, 0.6)),
)
@settings(max_examples=60, deadline=None)
def test_mask_and_boxes_stay_on_the_image(
    height: int, width: int, mode: str, corner: tuple[float, float]
) -> None:
    """A white rectangle is its own mask and its own box, before and after."""
    y0, x0 = int(corner[0] * height), int(corner[1] * width)
    y1, x1 = y0 + max(height // 3, 1), x0 + max(width // 3, 1)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y0:y1, x0:x1] = 255
    mask = torch.from_numpy((pixels[..., 0] > 0).astype(np.uint8))
    transform = Preprocess(
        size=(40, 40), mode=mode, interpolation="nearest", mean=(0, 0, 0), std=(1, 1, 1)
    )
    image, new_mask, boxes = transform(Image.fromarray(pixels), mask, [(x0, y0, x1, y1)])
    assert new_mask is not None and boxes is not None
    assert torch.equal(image[0] > 0.5, new_mask == 1)
    # A pixel of the mask is a pixel of the box up to the rounding of one edge.
    drawn = boxes_to_mask(boxes, (40, 40))
    grown = [(a - 1, b - 1, c + 1, d + 1) for a, b, c, d in boxes]
    shrunk = [(a + 1, b + 1, c - 1, d - 1) for a, b, c, d in boxes]
    assert not (new_mask.bool() & ~boxes_to_mask(grown, (40, 40)).bool()).any()
    assert not (boxes_to_mask(shrunk, (40, 40)).bool() & ~new_mask.bool()).any()
    assert drawn.shape == new_mask.shape


def test_a_box_that_is_cut_away_has_no_area() -> None:
    transform = Preprocess(size=(10, 10), crop_pct=1.0)
    _, _, boxes = transform(noise(10, 30), None, [(0, 0, 5, 10), (10, 0, 20, 10)])
    assert boxes == [(0.0, 0.0, 0.0, 10.0), (0.0, 0.0, 10.0, 10.0)]
    assert boxes_to_mask(boxes[:1], (10, 10)).sum() == 0


def test_refusals() -> None:
    with pytest.raises(InputError, match="resize mode 'fit' is unknown"):
        Preprocess(mode="fit")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="interpolation 'magic'"):
        Preprocess(interpolation="magic")
    border = {"input_size": (3, 8, 8), "mean": (0,) * 3, "std": (1,) * 3, "crop_mode": "border"}
    with pytest.raises(InputError, match="'squash'"):
        Preprocess.from_config(border)
    with pytest.raises(InputError, match="images of 2 channels"):
        Preprocess.from_config({"input_size": (2, 28, 28), "mean": (0.5,), "std": (0.5,)})
    assert Preprocess.from_config(border, "squash").mode == "squash"


def test_patch_mask_nearest_is_the_top_left_pixel() -> None:
    mask = (torch.rand(2, 32, 48, generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8)
    assert torch.equal(patch_mask(mask, (2, 3), "nearest"), mask[:, ::16, ::16])


def test_patch_mask_majority_counts_pixels() -> None:
    mask = torch.randint(0, 3, (3, 12, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([0, 1, 255], dtype=torch.uint8)[mask]
    out = patch_mask(mask, (3, 2))
    for b in range(3):
        for i in range(3):
            for j in range(2):
                cell = mask[b, i * 4 : i * 4 + 4, j * 4 : j * 4 + 4]
                votes = [(int((cell == v).sum()), -place) for place, v in enumerate((1, 0, 255))]
                winner = (1, 0, 255)[-max(votes)[1]]
                assert out[b, i, j] == winner
    assert patch_mask(torch.ones(4, 4, dtype=torch.bool), (2, 2)).tolist() == [[1, 1], [1, 1]]


def test_patch_mask_refusals() -> None:
    with pytest.raises(InputError, match="3×2 patches does not divide a mask of 8×8"):
        patch_mask(torch.zeros(8, 8), (3, 2))
    with pytest.raises(InputError, match="rule 'mean'"):
        patch_mask(torch.zeros(8, 8), (2, 2), "mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1)])
def test_an_image_that_would_not_fit_into_memory_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="too elongated .* 'squash'"):
        Preprocess()(Image.new("RGB", size))
    assert Preprocess(mode="squash")(Image.new("RGB", size))[0].shape == (3, 224, 224)
