"""The mark in every file that the package writes, by which it knows its own files again."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Final

MARK: Final = "captum-classemb"
#: For ``savefig(metadata=…)``: a text chunk, which stands before the pixels.
PNG_MARK: Final = {"Software": MARK}
JSON_MARK: Final = {"written_by": MARK}
NPZ_MARK: Final = "written_by"
HTML_MARK: Final = f'<meta name="generator" content="{MARK}">'

_HEAD = 4096


def is_marked(path: Path) -> bool:
    """Whether this package wrote a file.

    Args:
        path: a file; of other types than PNG, JSON, npz and HTML none is marked.
    """
    look = _LOOKS.get(path.suffix.lower())
    try:
        return look is not None and look(path)
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile):
        return False


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _png(path: Path) -> bool:
    return f"tEXtSoftware\0{MARK}".encode() in _head(path)


def _html(path: Path) -> bool:
    return HTML_MARK.encode() in _head(path)


def _json(path: Path) -> bool:
    content = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and content.get("written_by") == MARK


def _npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return f"{NPZ_MARK}.npy" in archive.namelist()


_LOOKS = {".png": _png, ".html": _html, ".htm": _html, ".json": _json, ".npz": _npz}
