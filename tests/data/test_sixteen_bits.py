"""Sixteen bits a channel, whatever file they lie in: divided by 257, or refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from catalogue.images import png
from PIL import Image

from captum_classemb.data import read_image
from captum_classemb.errors import DataError

KINDS = {"<": b"II*\0", ">": b"MM\0*"}
#: Channels, photometric interpretation, and what the last channel is, of a TIFF.
GRAY, WHITE_IS_ZERO, RGB, CMYK = (1, 1, None), (1, 0, None), (3, 2, None), (4, 5, None)
RGBX, PREMULTIPLIED, RGBA = (4, 2, 0), (4, 2, 1), (4, 2, 2)


def noise(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 65536, (6, 5, channels), dtype=np.uint16)


def tiff(
    values: np.ndarray, order: str, photometric: int, extra: int | None, planes: bool = False
) -> bytes:
    """A TIFF of H×W×C values, uncompressed, as the standard writes it."""
    height, width, channels = values.shape
    data = values.astype(order + "u2")
    strips = [data[..., k].tobytes() for k in range(channels)] if planes else [data.tobytes()]
    sizes = [len(strip) for strip in strips]
    starts = [8 + sum(sizes[:k]) for k in range(len(strips))]
    tags = {256: [width], 257: [height], 258: [16] * channels, 259: [1], 262: [photometric]}
    tags |= {273: starts, 277: [channels], 278: [height], 279: sizes, 284: [2 if planes else 1]}
    tags |= {} if extra is None else {338: [extra]}
    ifd = 8 + sum(sizes)
    behind, blob, entries = ifd + 2 + 12 * len(tags) + 4, b"", b""
    for tag, numbers in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(raw) > 4:
            raw, blob = struct.pack(order + "I", behind + len(blob)), blob + raw
        entries += struct.pack(order + "HHI", tag, 3, len(numbers)) + raw.ljust(4, b"\0")
    head = KINDS[order] + struct.pack(order + "I", ifd) + b"".join(strips)
    return head + struct.pack(order + "H", len(tags)) + entries + bytes(4) + blob


def read(content: bytes, suffix: str, folder: Path) -> np.ndarray:
    (folder / f"a.{suffix}").write_bytes(content)
    return np.asarray(read_image(folder / f"a.{suffix}")).astype(int)


def rounded(values: np.ndarray) -> np.ndarray:
    """What 257 goes into most nearly: not always the upper byte."""
    found = np.rint(values / 257).astype(np.uint8)
    assert (found != values >> 8).mean() > 0.1
    return found


def on_white(values: np.ndarray) -> np.ndarray:
    colour, alpha = values[..., :3] / 65535, values[..., 3:] / 65535
    return 255 * (colour * alpha + 1 - alpha)


@pytest.mark.parametrize("order", KINDS)
@pytest.mark.parametrize("kind", [GRAY, RGB, RGBX])
def test_tiff(kind: tuple[int, int, int | None], order: str, tmp_path: Path) -> None:
    values = noise(kind[0])
    found = read(tiff(values, order, *kind[1:]), "tif", tmp_path)
    np.testing.assert_array_equal(found, np.broadcast_to(rounded(values)[..., :3], found.shape))


def test_tiff_whose_white_is_zero(tmp_path: Path) -> None:
    values = noise(1)
    found = read(tiff(values, "<", *WHITE_IS_ZERO[1:]), "tif", tmp_path)
    np.testing.assert_array_equal(found, np.broadcast_to(255 - rounded(values), found.shape))


@pytest.mark.parametrize("order", KINDS)
def test_tiff_of_printing_colours(order: str, tmp_path: Path) -> None:
    values = noise(4)
    found = read(tiff(values, order, *CMYK[1:]), "tif", tmp_path)
    expected = Image.frombytes("CMYK", (5, 6), rounded(values).tobytes()).convert("RGB")
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("order", KINDS)
def test_tiff_with_opacity(order: str, tmp_path: Path) -> None:
    values = noise(4)
    found = read(tiff(values, order, *RGBA[1:]), "tif", tmp_path)
    np.testing.assert_allclose(found, on_white(values), atol=1.01)
    # Colours that are multiplied by it are never above it.
    values[..., :3] = values[..., :3] * (values[..., 3:] / 65535)
    found = read(tiff(values, order, *PREMULTIPLIED[1:]), "tif", tmp_path)
    expected = 255 * (values[..., :3] / 65535 + 1 - values[..., 3:] / 65535)
    np.testing.assert_allclose(found, expected, atol=1.6)


@pytest.mark.parametrize("kind", [RGB, RGBA, CMYK])
@pytest.mark.parametrize("order", KINDS)
def test_planes_are_refused(order: str, kind: tuple[int, int, int | None], tmp_path: Path) -> None:
    """Pillow takes the bytes of one pixel for two."""
    with pytest.raises(DataError, match=r"a\.tif has 16-bit colours in planes"):
        read(tiff(noise(kind[0]), order, *kind[1:], planes=True), "tif", tmp_path)


def test_gray_png_with_opacity(tmp_path: Path) -> None:
    values = noise(2)
    found = read(png(values, 16, 4), "png", tmp_path)
    np.testing.assert_allclose(found, on_white(values[..., [0, 0, 0, 1]]), atol=1.01)
    values[..., 1] = 65535
    found = read(png(values, 16, 4), "png", tmp_path)
    expected = rounded(values[..., :1])
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize(("word", "channels"), [(b"P5", 1), (b"P6", 3)])
@pytest.mark.parametrize("largest", [65535, 1000])
def test_portable_maps_are_divided_by_what_they_say(
    word: bytes, channels: int, largest: int, tmp_path: Path
) -> None:
    values = np.minimum(noise(channels), largest)
    content = word + b" 5 6 %d\n" % largest + values.astype(">u2").tobytes()
    found = read(content, "ppm", tmp_path)
    expected = np.broadcast_to(255 * values.astype(float) / largest, found.shape)
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_silicon_graphics_is_refused(tmp_path: Path) -> None:
    head = struct.pack(">HBBHHHHII", 474, 0, 2, 3, 5, 6, 3, 0, 65535).ljust(512, b"\0")
    content = head + noise(3).transpose(2, 0, 1).astype(">u2").tobytes()
    with pytest.raises(DataError, match="16-bit colours in planes"):
        read(content, "sgi", tmp_path)
