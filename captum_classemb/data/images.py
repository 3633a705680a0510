"""Photographs from files: found, and read whatever their format.

Every image file that the library reads, for explanations and for studies alike, is read here.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from captum_classemb.data.marks import is_marked
from captum_classemb.errors import DataError

#: What is taken for an image in a folder. Those of them that Pillow cannot read are refused by
#: name, so that no photograph is passed over in silence.
_SUFFIXES = """
    apng avif bmp dib gif heic heif j2k jfif jp2 jpe jpeg jpg jxl pbm pgm png pnm ppm tga tif tiff
    webp
"""
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BITS = re.compile(r"((?:RGB|RGBA|RGBa|RGBX|CMYK);16)([BLN])")
_MIN_IS_WHITE, _PHOTOMETRIC, _BITS, _PLANES = 0, 262, 258, 284


class Source(NamedTuple):
    """The bytes that an image was decoded from.

    Attributes:
        size: their number.
        modified: when the file was changed last, in nanoseconds.
        sha256: of these bytes.
        frames: images in the file, of which the first is read.
    """

    size: int
    modified: int
    sha256: str
    frames: int = 1


class Photograph(NamedTuple):
    """An image file that was read.

    Attributes:
        image: 8-bit RGB, upright.
        orientation: how the stored pixels are turned, 1 to 8 as EXIF counts.
        source: what it was decoded from.
    """

    image: Image.Image
    orientation: int
    source: Source


def exists(path: Path) -> bool:
    """Whether a file is there, also for names that no file system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def printable(name: str) -> str:
    """A file's name for tables and pictures, which take no control characters and broken bytes."""
    unknown = "\N{REPLACEMENT CHARACTER}"
    return "".join(letter if letter.isprintable() else unknown for letter in name)


def is_image(file: Path) -> bool:
    """Whether a file in a folder is taken for a photograph: by its suffix, unless it is hidden.

    A link that leads nowhere counts, for it is to be named; a picture that this package drew does
    not.
    """
    return (
        file.suffix.lower() in IMAGE_SUFFIXES
        and not file.name.startswith(".")
        and (file.is_file() or (file.is_symlink() and not file.exists()))
        and not is_marked(file)
    )


def find_images(path: str | Path) -> list[Path]:
    """The image files that a path stands for.

    Args:
        path: an image file, which is returned whatever its suffix, or a folder, which is searched
            with its sub-folders for the suffixes of `IMAGE_SUFFIXES`; hidden files, and pictures
            that this package drew, are left out.

    Returns:
        The files, in sorted order.

    Raises:
        DataError: if nothing is there, or a folder holds no image.
    """
    path = Path(path)
    if exists(path):
        return [path]
    if not os.path.isdir(path):
        raise DataError(f"{path} does not exist: give an image file or a folder of images.")
    found = sorted(
        file for file in path.rglob("*") if is_image(file) and not _is_hidden(file.parent, path)
    )
    if not found:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"The folder {path} holds no image: the suffixes {suffixes} are read.")
    return found


def _is_hidden(folder: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in folder.relative_to(root).parts)


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright; see :func:`read_photograph`."""
    return read_photograph(path).image


def read_photograph(path: str | Path) -> Photograph:
    """Read an image file.

    The rotation that a camera noted (EXIF) is applied; transparency is laid on white; 16 bits are
    divided by 257, whatever the image holds; grayscale, palette and CMYK are converted; of an
    animation the first frame is read.

    Args:
        path: the file.

    Raises:
        DataError: if the file is missing, empty, truncated, no image, or of a pixel type whose
            range of brightness is not known.
    """
    path = Path(path)
    content, status = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            # Asking a PNG for its orientation decodes it, after which it knows of no 16 bits.
            tiles = list(getattr(image, "tile", []))
            noted = _orientation(image)
            upright, orientation = _upright(image, f"The image {path}", content, tiles)
            frames = _frames(image)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"The image {path} has too many pixels: store it smaller.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"The file {path} is no image that Pillow can read.") from error
    # Pillow's decoders raise whatever broken bytes make them stumble over (OSError, SyntaxError,
    # struct.error, zlib.error, ...): all of it means that this one file is damaged.
    except Exception as error:
        raise DataError(f"The image {path} is truncated or damaged: {_one_line(error)}.") from error
    digest = hashlib.sha256(content).hexdigest()
    source = Source(len(content), status.st_mtime_ns, digest, frames)
    # A decoder may have turned the pixels already, and then forgets that they were turned.
    return Photograph(upright, orientation if orientation > 1 else noted, source)


def _read_bytes(path: Path) -> tuple[bytes, os.stat_result]:
    if not exists(path):
        raise DataError(f"The image {path} does not exist.")
    try:
        with path.open("rb") as file:
            content, status = file.read(), os.fstat(file.fileno())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"The image {path} cannot be read: {reason}.") from error
    if not content:
        raise DataError(f"The image {path} is empty (0 bytes): replace the file.")
    return content, status


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text or type(error).__name__


def _orientation(image: Image.Image) -> int:
    noted = image.getexif().get(_ORIENTATION)
    return noted if noted in _TURNS else 1


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind as an image file of that kind is read: 8-bit RGB, upright.

    Raises:
        DataError: if it is of a pixel type whose range of brightness is not known.
    """
    return _upright(image, "The image")[0]


def _upright(
    image: Image.Image, called: str, content: bytes = b"", tiles: Sequence[Any] = ()
) -> tuple[Image.Image, int]:
    """The image in RGB, and by how much it still had to be turned."""
    values = _sixteen_bits(image, called, content, tiles)
    image.load()
    orientation = _orientation(image)
    if values is not None:
        rgb = _on_white(_eight_bits(values, image))
    elif image.mode in {"I", "F"}:
        raise DataError(
            f"{called} has 32-bit pixels, which say not what is white: "
            "save it with 8 or 16 bits a channel."
        )
    elif image.mode == "LAB":
        raise DataError(f"{called} has Lab colours, which are not read: save it as RGB.")
    else:
        rgb = _on_white(image)
    return turn(rgb, orientation), orientation


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """Undo a rotation or reflection that is noted as EXIF does, 1 to 8."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _sixteen_bits(
    image: Image.Image, called: str, content: bytes, tiles: Sequence[Any]
) -> npt.NDArray[np.uint32] | None:
    """H×W×(1, 3 or 4) values of 16 bits; None where the file has fewer.

    Raises:
        DataError: if Pillow gives no way to read all of them.
    """
    tags: Any = getattr(image, "tag_v2", {})
    layouts = [str(tile[3] if isinstance(tile[3], str) else tile[3][0]) for tile in tiles]
    deep = any(bits > 8 for bits in tags.get(_BITS, ()))
    if (deep and tags.get(_PLANES) == 2) or any(tile[0] == "SGI16" for tile in tiles):
        raise DataError(
            f"{called} has 16-bit colours in planes, which are not read: save it as PNG."
        )
    # PNG and PGM know 16 bits at most; Pillow before 11.3 reads those of a PNG into 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        values = np.asarray(image).astype(np.uint32)[..., None]
        return 65535 - values if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE else values
    if not layouts:
        return None
    if layouts == ["LA;16B"]:
        # Of such a PNG Pillow keeps the upper bytes; as four channels of 8 bits it has all.
        every = np.asarray(_read_as(content, tiles, ["RGBA"])).astype(np.uint32)
        gray, alpha = (every[..., i] * 256 + every[..., i + 1] for i in (0, 2))
        return np.stack([gray, gray, gray, alpha], -1)
    if not all(_SIXTEEN_BITS.fullmatch(layout) for layout in layouts):
        return None
    # Of colours Pillow keeps the upper byte alone. Read with the bytes swapped, it keeps the lower.
    plain = [layout.replace("RGBa", "RGBA") for layout in layouts]
    low = _read_as(content, tiles, list(map(_swap_bytes, plain)))
    high = _read_as(content, tiles, plain)
    upper, lower = (np.asarray(read).astype(np.uint32) for read in (high, low))
    return upper * 256 + lower


def _read_as(content: bytes, tiles: Sequence[Any], layouts: Sequence[str]) -> Image.Image:
    """The file decoded as if its pixels lay otherwise."""
    image: Any = Image.open(io.BytesIO(content))
    image.tile = [
        (*tile[:3], layout if isinstance(tile[3], str) else (layout, *tile[3][1:]))
        for tile, layout in zip(tiles, layouts, strict=True)
    ]
    image.load()
    read: Image.Image = image
    return read


def _swap_bytes(layout: str) -> str:
    match = _SIXTEEN_BITS.fullmatch(layout)
    assert match is not None
    return match[1] + ("L" if match[2] == "B" else "B")


def _eight_bits(values: npt.NDArray[np.uint32], image: Image.Image) -> Image.Image:
    """16 bits a channel to 8; pixels of the transparent value become clear."""
    scaled = ((values + 128) // 257).astype(np.uint8)
    if values.shape[-1] == 4:
        # What is multiplied by its opacity is divided by it when it is laid on white.
        mode = "RGBa" if _tiff_alpha(image) == 1 else image.mode
        return Image.frombytes(mode, image.size, scaled.tobytes())
    rgb = np.broadcast_to(scaled, (*scaled.shape[:2], 3))
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(np.ascontiguousarray(rgb))
    clear = (values == np.asarray(transparent)).all(-1, keepdims=True)
    return Image.fromarray(np.concatenate([rgb, np.where(clear, 0, 255).astype(np.uint8)], -1))


def _tiff_alpha(image: Image.Image) -> int | None:
    """What a TIFF says of its fourth channel: 1 where colours are multiplied by it."""
    tags: Any = getattr(image, "tag_v2", {})
    extra = tags.get(338) or (None,)
    return extra[0] if image.mode == "RGBA" else None


def _on_white(image: Image.Image) -> Image.Image:
    if "transparency" in image.info or image.mode in {"RGBA", "RGBa", "LA", "La", "PA"}:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _frames(image: Image.Image) -> int:
    """How many images an animation or a document has; a camera's MPO is one photograph."""
    if image.format == "MPO":
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    # The first frame is whole, whatever is wrong with those behind it.
    except Exception:
        return 1


def stored_size(path: Path) -> tuple[tuple[int, int], int]:
    """Width and height of the stored pixels, and their orientation, from a file's head.

    Raises:
        DataError: if it is no image.
    """
    try:
        with Image.open(path) as image:
            orientation = _orientation(image)
            if image.format == "TIFF" and orientation > 4:
                # Pillow gives the size of the turned image.
                tags: Any = image.tag_v2  # type: ignore[attr-defined]
                return (int(tags[256]), int(tags[257])), orientation
            return image.size, orientation
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} has too many pixels: store it smaller.") from error
    except Exception as error:
        raise DataError(f"{path} is no readable image.") from error
