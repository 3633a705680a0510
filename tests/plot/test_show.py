"""Maps over an image in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.plot import show
from captum_classemb.plot.maps import blend, color_scale

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
MAP = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def images(folder: Path) -> dict[str, Any]:
    file = folder / "a.png"
    Image.fromarray(PIXELS).save(file)
    return {
        "path": file,
        "text": str(file),
        "PIL": Image.fromarray(PIXELS),
        "8 bits": PIXELS,
        "numbers": PIXELS / 255.0,
        "tensor": torch.from_numpy(PIXELS).movedim(-1, 0) / 255.0,
        "batch of one": torch.from_numpy(PIXELS).movedim(-1, 0)[None] / 255.0,
    }


def test_every_kind_of_image_is_the_same(tmp_path: Path) -> None:
    expected = (255 * blend(PIXELS, MAP, color_scale(MAP), False)).round().astype(np.uint8)
    for name, image in images(tmp_path).items():
        assert np.array_equal(show(image, MAP, output="array"), expected), name
    assert np.array_equal(np.asarray(show(PIXELS, MAP, output="image")), expected)


def test_attributions_of_pixels_are_summed_over_channels() -> None:
    pixels = torch.randn(1, 3, 32, 48)
    expected = show(PIXELS, pixels[0].sum(0), output="array")
    assert np.array_equal(show(PIXELS, pixels, output="array"), expected)
    assert np.array_equal(show(PIXELS, pixels[0], output="array"), expected)


def test_maps_share_one_scale_and_the_bar_says_what_is_clipped() -> None:
    weak = 0.01 * MAP
    axes = show(PIXELS, {"strong": MAP, "weak": weak}, label="logit")
    assert [ax.get_title(loc="left") for ax in axes] == ["", "strong", "weak"]
    drawn = axes[2].images[0].get_array()
    scale = color_scale(np.stack([MAP.numpy(), weak.numpy()]))
    assert np.allclose(drawn, blend(PIXELS, weak, scale, False))
    assert not np.allclose(drawn, blend(PIXELS, weak, color_scale(weak), False))
    (bar,) = [ax for ax in axes[0].figure.axes if ax not in set(axes)]
    assert bar.get_ylabel() == "logit"
    assert np.array_equal(axes[0].images[0].get_array(), PIXELS)
    plt.close(axes[0].figure)


@pytest.mark.parametrize(
    ("image", "maps", "match"),
    [
        (PIXELS[..., 0], MAP, "image has shape"),
        (torch.randn(3, 32, 48), MAP, "before normalisation"),
        (PIXELS, torch.randn(2, 3, 32, 48), "a map has shape"),
        (PIXELS, {}, "no map"),
        (PIXELS, torch.randn(64, 96), "does not fit"),
    ],
)
def test_what_is_refused(image: Any, maps: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        show(image, maps, output="array")


def test_several_maps_are_no_single_image() -> None:
    with pytest.raises(InputError, match="2 maps were given"):
        show(PIXELS, {"a": MAP, "b": MAP}, output="image")
    with pytest.raises(InputError, match="'figure' is none of"):
        show(PIXELS, MAP, output="figure")  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError):
        show(PIXELS, MAP / 0, output="array")
