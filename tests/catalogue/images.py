"""Image files: each row a name, whether it is read, and its bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

Row = tuple[str, bool, bytes]
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(
    values: np.ndarray, bits: int, colour: int, before: bytes = b"", size: tuple[int, int] = (0, 0)
) -> bytes:
    """A PNG of H×W×C values, as the standard writes it."""
    width, height = size if any(size) else (values.shape[1], values.shape[0])
    rows = values.astype(">u2" if bits == 16 else np.uint8)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    end = chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + before + end


def sixteen(channels: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 65536, (6, 8, channels), dtype=np.uint16)


def animation(kind: str, frames: int) -> bytes:
    images = [Image.fromarray(np.roll(NOISE, i, 0)) for i in range(frames)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:])


def oriented(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(NOISE), kind, exif=exif)


def images() -> Iterator[Row]:
    """All rows."""
    photo = Image.fromarray(NOISE)
    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "DIB", "JPEG2000")
    for kind in kinds:
        whole = encoded(photo, kind)
        yield f"{kind} of colours", True, whole
        for share in (0.3, 0.6):
            # These two have no end that could be missing: the rest is read as it is, or not.
            yield f"{kind} cut at {share}", False, whole[: int(share * len(whole))]
        yield f"{kind} with an appendix", True, whole + b"more" * 9
        yield f"{kind} without its head", False, whole[20:]
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"PNG of mode {mode}", True, encoded(photo.convert(mode), "PNG")
    for mode in ("1", "L", "RGB", "CMYK", "YCbCr", "RGBA", "P"):
        yield f"TIFF of mode {mode}", True, encoded(photo.convert(mode), "TIFF")
    yield "TIFF of Lab colours", False, encoded(photo.convert("RGB").convert("LAB"), "TIFF")
    for mode in ("L", "CMYK", "RGB"):
        yield f"JPEG of mode {mode}", True, encoded(photo.convert(mode), "JPEG")
    for value in (np.float32(0.5), np.int32(9)):
        flat = Image.fromarray(np.full((4, 4), value))
        yield f"TIFF of {value.dtype}", False, encoded(flat, "TIFF")
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        yield f"TIFF by {compression}", True, encoded(photo, "TIFF", compression=compression)
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        yield f"PNG of 16 bits, {channels} channels", True, png(sixteen(channels), 16, colour)
    gray = chunk(b"tRNS", struct.pack(">H", int(sixteen(1)[0, 0, 0])))
    yield "PNG of 16 bits with a clear value", True, png(sixteen(1), 16, 0, gray)
    colour_key = chunk(b"tRNS", struct.pack(">HHH", *sixteen(3)[0, 0].tolist()))
    yield "PNG of 16 bits with a clear colour", True, png(sixteen(3), 16, 2, colour_key)
    yield (
        "PNG of 8 bits with a clear value",
        True,
        encoded(photo.convert("L"), "PNG", transparency=3),
    )
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 77):
            yield f"{kind} turned by {orientation}", True, oriented(kind, orientation)
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        for frames in (2, 5):
            yield f"{kind} of {frames} frames", True, animation(kind, frames)
    for size in ((1, 1), (1, 200), (200, 1), (3, 3)):
        yield f"PNG of {size[0]}×{size[1]}", True, encoded(photo.resize(size), "PNG")
    for size in ((60_000, 60_000), (2**31 - 1, 1), (200_000_000, 2)):
        yield f"PNG that says {size[0]}×{size[1]}", False, png(NOISE, 8, 2, size=size)
    for size in ((0, 5), (5, 0), (0, 0)):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
        body = head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        yield f"PNG of {size[0]}×{size[1]}", False, b"\x89PNG\r\n\x1a\n" + body
    whole = encoded(photo, "PNG")
    yield "PNG with a wrong check sum", False, whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    yield "PNG of 3 bits", False, png(NOISE, 3, 2)
    yield "PNG of colour type 5", False, png(NOISE, 8, 5)
    text = b"comment\0" + b"x" * 20
    yield "PNG with a text", True, png(NOISE, 8, 2, chunk(b"tEXt", text))
    bomb = b"comment\0\0" + zlib.compress(b"\0" * 200_000_000)
    yield "PNG whose text unpacks to 200 MB", False, png(NOISE, 8, 2, chunk(b"zTXt", bomb))
    broken = encoded(photo, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    yield "JPEG with a broken EXIF", True, broken
    yield "JPEG with an ICC profile of noise", True, encoded(photo, "JPEG", icc_profile=b"no" * 50)
    yield "JPEG progressive", True, encoded(photo, "JPEG", progressive=True)
    others = {
        "nothing": b"", "one byte": b"\x89", "a space": b" ", "text": b"no image at all",
        "HTML": b"<html><img src=a.png></html>", "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "JSON": b'{"a": 1}', "a zip": b"PK\x03\x04" + b"\0" * 40, "a PDF": b"%PDF-1.4\n%%EOF",
        "zeros": b"\0" * 4096, "noise": RNG.integers(0, 256, 4096, dtype=np.uint8).tobytes(),
        "a HEIC head": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a JXL head": b"\xff\x0a\x00",
        "a RIFF that is a sound": b"RIFF\x24\0\0\0WAVEfmt ", "an ELF": b"\x7fELF\x02\x01\x01",
        "the head of a PNG": b"\x89PNG\r\n\x1a\n", "the head of a JPEG": b"\xff\xd8\xff\xe0",
        "the head of a GIF": b"GIF89a", "a git pointer": b"version https://git-lfs.github.com/spec/v1",
        "a pickle": b"\x80\x04\x95\x00", "UTF-16": "an image".encode("utf-16"),
    }  # fmt: skip
    for name, content in others.items():
        yield name, False, content
