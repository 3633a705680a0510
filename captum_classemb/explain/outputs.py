"""Results on disk: all the files of an image, or none; and never over what is not ours."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from captum_classemb.data.marks import is_marked
from captum_classemb.errors import OutputError

# Bytes of a name, with room for a number and a suffix in the 255 that file systems take.
_LONGEST = 240


def check_writable(folder: Path) -> None:
    """Find out whether files can be written to a folder, and leave no trace of it.

    Raises:
        OutputError: if the folder cannot be made, or written to.
    """
    missing = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise _unwritable(folder, error) from error
    finally:
        for made in missing:
            if os.path.isdir(made):
                made.rmdir()


class Protected:
    """Files that are never written over: inputs, and whatever this package did not write.

    Args:
        inputs: files that are read.
        overwrite: whether files of others that are no inputs may be written over.
    """

    def __init__(self, inputs: Iterable[Path], overwrite: bool = False) -> None:
        inputs = list(inputs)
        self.overwrite = overwrite
        self._paths = {os.path.realpath(path) for path in inputs}
        self._nodes = set(filter(None, map(_node, inputs)))

    def check(self, paths: Iterable[Path]) -> None:
        """Find out whether files may be written.

        Raises:
            OutputError: if one of them is an input, a folder, or a file that this package did not
                write, unless that was allowed.
        """
        for path in paths:
            if os.path.realpath(path) in self._paths or _node(path) in self._nodes - {None}:
                raise OutputError(
                    f"{path} is an input, which is never written over: choose another --output."
                )
            if not os.path.lexists(path):
                continue
            if os.path.isdir(path):
                raise OutputError(f"{path} is a folder: choose another --output.")
            if not self.overwrite and not is_marked(path):
                raise OutputError(
                    f"{path} was not written by captum-classemb: choose another --output, or say "
                    "--overwrite."
                )


def _node(path: Path) -> tuple[int, int] | None:
    """What a file is under all its names."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files so that either all are there in the end, or none is half-written.

    Args:
        folder: where to; made if it is missing.
        contents: bytes by file name.

    Raises:
        OutputError: if they cannot be written.
    """
    drafts: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            draft = folder / f".classemb.{os.getpid()}{Path(name).suffix}.tmp"
            drafts[draft] = folder / name
            draft.write_bytes(content)
        for draft, final in drafts.items():
            os.replace(draft, final)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def _unwritable(folder: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(
        f"The output folder {folder} cannot be written ({reason}): choose another with --output."
    )


def unique_stems(files: Iterable[Path]) -> list[str]:
    """A name for each file's results: its own without suffix, numbered where two are alike.

    Names that leave no room for a suffix are cut, and end in a hash of the whole.

    Examples:
        >>> unique_stems([Path("a/cat.jpg"), Path("b/cat.png"), Path("dog.png")])
        ['cat', 'cat-2', 'dog']
        >>> unique_stems([Path("x" * 250 + ".jpg")])[0][-12:]
        'xxx-086d4a1c'
    """
    stems: list[str] = []
    # Case is no difference on every file system.
    taken: set[str] = set()
    for file in files:
        stem, number = _shortened(file.stem), 2
        while stem.casefold() in taken:
            stem, number = f"{_shortened(file.stem)}-{number}", number + 1
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def _shortened(stem: str) -> str:
    name = os.fsencode(stem)
    if len(name) <= _LONGEST:
        return stem
    # A character that is cut in two is left out.
    return f"{name[: _LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:8]}"
