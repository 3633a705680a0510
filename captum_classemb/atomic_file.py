"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from captum_classemb.errors import OutputError


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Write a file so that whoever opens it finds the old content or the new, nothing between.

    Args:
        path: the file; its folder is made if need be.
        content: written one after another.

    Raises:
        OutputError: if it cannot be written.
    """
    # One name for each file, so that what a killed process left behind is written over.
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}): choose another place for it."
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
