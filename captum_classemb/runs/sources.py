"""The files that a run has read, so that it never goes on with others."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from captum_classemb.atomic_file import write_atomically
from captum_classemb.data.images import Source
from captum_classemb.errors import OutputError

FILES = "files.csv"


class FileRead(NamedTuple):
    """One file that was read, or refused.

    Attributes:
        image: its place in the dataset.
        file: its path; empty for an image that was refused.
        source: what was decoded; None for that image.
        refused: why.
    """

    image: int
    file: str
    source: Source | None = None
    refused: str = ""


class ReadFiles:
    """The files that one process has read, in a list on disk that grows with the checkpoints.

    Args:
        folder: where the checkpoints lie.
        rank: of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank-{rank}.files"
        self.known: dict[tuple[int, str], FileRead] = {}
        self._new: list[FileRead] = []

    def add(self, files: Iterable[FileRead]) -> None:
        """Take files that were read.

        Raises:
            OutputError: if one of them was read before, and had other bytes.
        """
        for read in files:
            before = self.known.get((read.image, read.file))
            if before is None:
                self._new.append(read)
                self.known[read.image, read.file] = read
            elif _digest(before) != _digest(read):
                raise _changed(read.file)

    def save(self) -> None:
        """Write what is new; before the checkpoint that counts it is written."""
        if not self._new:
            return
        lines = "".join(f"{json.dumps(read)}\n" for read in self._new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}.") from error
        self._new = []

    def restore(self, images: Iterable[int], verify: bool = False) -> None:
        """Go on with the files of images that are in the sums already; forget all others.

        Args:
            images: their places in the dataset.
            verify: read all of them again; else those whose size or time of change differs.

        Raises:
            OutputError: if one of them holds other bytes now, or is gone.
        """
        wanted = set(images)
        kept = {}
        for read in self._stored():
            if read.image in wanted:
                kept[read.image, read.file] = read
        check_files(kept.values(), verify)
        self.known, self._new = kept, []
        if not self.path.exists():
            return
        # Without what a killed process left behind the last checkpoint.
        lines = "".join(f"{json.dumps(read)}\n" for read in kept.values())
        write_atomically(self.path, lines.encode())

    def _stored(self) -> Iterator[FileRead]:
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                image, file, source, refused = json.loads(line)
                yield FileRead(image, file, Source(*source) if source else None, refused)
            except (ValueError, TypeError):
                # A line that was being written when the process was killed.
                continue

    def remove(self) -> None:
        """Delete the list."""
        self.path.unlink(missing_ok=True)


def _digest(read: FileRead) -> str | None:
    return read.source.sha256 if read.source else None


def _changed(file: str) -> OutputError:
    return OutputError(
        f"{file} has changed since the run read it: start the run anew in another folder."
    )


def check_files(reads: Iterable[FileRead], verify: bool = False) -> None:
    """See that files still hold what was read of them.

    Args:
        reads: what was read.
        verify: read all of them again; else those whose size or time of change differs.

    Raises:
        OutputError: if one of them holds other bytes now, or is gone.
    """
    for read in reads:
        _check(read, verify)


def _check(read: FileRead, verify: bool) -> None:
    if read.source is None:
        return
    path = Path(read.file)
    try:
        status = path.stat()
        same = (status.st_size, status.st_mtime_ns) == (read.source.size, read.source.modified)
        if same and not verify:
            return
        content = path.read_bytes()
    except OSError as error:
        raise _changed(read.file) from error
    if hashlib.sha256(content).hexdigest() != read.source.sha256:
        raise _changed(read.file)


def write_files(output: Path, reads: Sequence[FileRead]) -> dict[str, Any]:
    """Write ``files.csv``: every file that was read, in the order of the dataset.

    Returns:
        What ``run.json`` says of it.
    """
    reads = sorted(set(reads))
    read = [file for file in reads if file.source is not None]
    if not reads:
        return {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "file", *Source._fields])
    writer.writerows([file.image, file.file, *(file.source or ())] for file in read)
    content = text.getvalue().encode(errors="backslashreplace")
    write_atomically(output / FILES, content)
    animated = [file.file for file in read if file.source and file.source.frames > 1]
    return {
        "files": {
            "table": FILES,
            "sha256": hashlib.sha256(content).hexdigest(),
            "first_frames_of": animated,
        },
        "refused": [file.refused for file in reads if file.refused],
    }
