"""Photographs of every kind a folder may hold, and what a model is given of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from catalogue.images import png
from PIL import Image
from timm.data import create_transform, resolve_data_config

from captum_classemb.data import Preprocess, read_image
from captum_classemb.data.images import find_images, read_photograph
from captum_classemb.errors import DataError

RED, GREEN, BLUE = (250, 10, 20), (10, 240, 30), (15, 25, 245)


@pytest.fixture
def corners() -> Image.Image:
    """6×4 pixels: red at the upper left, green at the upper right, blue below."""
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[:2, :3], pixels[:2, 3:], pixels[2:] = RED, GREEN, BLUE
    return Image.fromarray(pixels)


def test_rgb_is_read_as_it_is(corners: Image.Image, tmp_path: Path) -> None:
    corners.save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(corners))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grayscale_has_three_equal_channels(mode: str, tmp_path: Path) -> None:
    gray = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert(mode)
    gray.save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    expected = np.array([[0, 255], [255, 0]])[..., None].repeat(3, -1)
    np.testing.assert_array_equal(pixels, expected)


def test_palette_has_its_colours(corners: Image.Image, tmp_path: Path) -> None:
    corners.quantize(8).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(corners))


def test_cmyk_has_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), RED).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    pixels = np.asarray(read_image(tmp_path / "a.jpg")).astype(int)
    assert np.abs(pixels - RED).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str, tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 3] = [255, 0, 51]
    Image.fromarray(pixels).convert(mode).save(tmp_path / "a.png")
    read = np.asarray(read_image(tmp_path / "a.png"))
    # Black: opaque, absent, and one fifth of it on white.
    np.testing.assert_array_equal(read[0, :, 0], [0, 255, 204])


def test_transparent_palette_entry_is_white(corners: Image.Image, tmp_path: Path) -> None:
    palette = corners.quantize(8)
    clear = palette.getpixel((0, 0))
    palette.save(tmp_path / "a.gif", transparency=clear)
    pixels = np.asarray(read_image(tmp_path / "a.gif"))
    np.testing.assert_array_equal(pixels[0, 0], (255, 255, 255))
    np.testing.assert_array_equal(pixels[3, 0], BLUE)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    read = np.asarray(read_image(tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(read[0, :, 1], [0, 1, 128, 255])


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has 32-bit pixels"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_rotation_is_undone(orientation: int, corners: Image.Image, tmp_path: Path) -> None:
    """Orientation k says how the stored pixels were turned from the upright image."""
    stored = {
        1: corners,
        2: corners.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: corners.transpose(Image.Transpose.ROTATE_180),
        4: corners.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: corners.transpose(Image.Transpose.TRANSPOSE),
        6: corners.transpose(Image.Transpose.ROTATE_90),
        7: corners.transpose(Image.Transpose.TRANSVERSE),
        8: corners.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(corners))


def test_missing_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        read_image(tmp_path / "nowhere.png")


def test_empty_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"a\.png is empty \(0 bytes\)"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_truncated_image(suffix: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    read_image(whole)
    with pytest.raises(DataError, match=rf"cut\.{suffix} (is truncated|is no image)"):
        read_image(cut)


def test_image_without_measure(
    corners: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corners.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(DataError, match=r"a\.png has too many pixels"):
        read_image(tmp_path / "a.png")


def test_text_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(DataError, match=r"a\.png is no image"):
        read_image(tmp_path / "a.png")


def test_folder_is_searched_in_order(tmp_path: Path) -> None:
    names = ["b.JPG", "a.png", "sub/c.jpeg", ".hidden.png", ".cache/d.png", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [file.relative_to(tmp_path).as_posix() for file in find_images(tmp_path)]
    assert found == ["a.png", "b.JPG", "sub/c.jpeg"]


def test_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "photo").touch()
    assert find_images(tmp_path / "photo") == [tmp_path / "photo"]


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch16_224_miil"]
)
@pytest.mark.parametrize("size", [(300, 200), (123, 456), (224, 224)])
def test_preprocessing_is_that_of_timm(name: str, size: tuple[int, int]) -> None:
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    preprocess = Preprocess.from_config(config)
    view = preprocess.view(image)
    assert view.shape == (224, 224, 3)
    assert view.dtype == np.uint8
    expected = create_transform(**config, is_training=False)(image)
    torch.testing.assert_close(preprocess.tensor(view), expected, rtol=0, atol=1e-6)


def test_view_is_what_the_tensor_shows() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.25)
    config = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0}
    preprocess = Preprocess.from_config({**config, "mean": mean, "std": std})
    view = preprocess.view(Image.new("RGB", (20, 10), RED))
    assert (view == RED).all()
    expected = (torch.tensor(RED) / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(preprocess.tensor(view)[:, 3, 5], expected)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_sixteen_bits_of_any_channels_are_divided_by_257(
    colour: int, channels: int, tmp_path: Path
) -> None:
    """By the range of the type: two pictures of one scene keep their difference in brightness."""
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, channels), dtype=np.uint16)
    if channels == 4:
        values[..., 3] = 65535
    (tmp_path / "a.png").write_bytes(png(values // 3, 16, colour))
    read = np.asarray(read_image(tmp_path / "a.png"))
    expected = np.rint((values // 3)[..., : min(3, channels)] / 257)
    if channels < 4:
        np.testing.assert_array_equal(read, np.broadcast_to(expected, read.shape))
    else:
        opaque = 65535 // 3 / 65535
        np.testing.assert_allclose(read, expected * opaque + 255 * (1 - opaque), atol=1.01)


def test_animations_give_their_first_frame_and_say_so(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for kind in ("gif", "png", "tif"):
        file = tmp_path / f"a.{kind}"
        frames[0].save(file, save_all=True, append_images=frames[1:])
        photo = read_photograph(file)
        assert photo.image.getpixel((0, 0)) == RED and photo.source.frames == 3
