"""What a study leaves on disk: atomic files, checkpoints in two generations, a lock."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from captum_classemb.errors import OutputError

__all__ = ["Checkpoints", "exclusive", "write_atomically"]

_MAGIC = b"classemb checkpoint 2\n"
_GENERATIONS = 2


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
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends.

    Raises:
        OutputError: if another process holds it.
    """
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be written: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that ended just now may have taken the file away after it was opened here.
            held = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            held = False
        if not held:
            raise OutputError(
                f"{path.parent} is in use by another process: wait for it, or choose another "
                "output folder."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints of one process, the last two of which are kept.

    A checkpoint is a checksum and a state. One that does not match its checksum (the machine went
    down while it was written) is passed over for the one before it.

    Args:
        folder: where they lie.
        rank: of the process; each has checkpoints of its own.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank

    def _generations(self) -> list[Path]:
        """Newest first."""
        pattern = re.compile(rf"rank-{self.rank}\.\d{{3}}\.\d{{8}}\.ckpt")
        # Not asked first whether it exists: another process may take it away meanwhile.
        with suppress(FileNotFoundError, NotADirectoryError):
            found = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
            return sorted(found, reverse=True)
        return []

    def save(self, number: int, done: int, state: dict[str, Any]) -> None:
        """Write a checkpoint after ``done`` batches of a pass, and drop all but the last two.

        Raises:
            OutputError: if it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save({"done": done, "state": state}, buffer)
        # Sums may be large: they are not copied once more.
        body = buffer.getbuffer()
        checksum = hashlib.sha256(body).hexdigest().encode()
        path = self.folder / f"rank-{self.rank}.{number:03d}.{done:08d}.ckpt"
        write_atomically(path, _MAGIC + checksum + b"\n", body)
        for old in self._generations()[_GENERATIONS:]:
            old.unlink(missing_ok=True)

    def newest(self) -> int:
        """The pass of the newest checkpoint that is whole; 0 without one."""
        return next((number for number, _, _ in self._whole()), 0)

    def load(self, number: int = 0) -> tuple[int, dict[str, Any]] | None:
        """Batches done and state of a pass's newest checkpoint that is whole; None without one.

        Raises:
            OutputError: if a whole checkpoint was written by another version.
        """
        for found, path, body in self._whole():
            if found == number:
                try:
                    stored = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
                except (RuntimeError, pickle.UnpicklingError) as error:
                    raise OutputError(f"{path} cannot be read by this version: {error}.") from error
                return int(stored["done"]), stored["state"]
        return None

    def _whole(self) -> Iterator[tuple[int, Path, memoryview]]:
        """Pass, file and content of the checkpoints that match their checksums, newest first."""
        for path in self._generations():
            content = memoryview(path.read_bytes())
            head = len(_MAGIC) + 64
            body = content[head + 1 :]
            if content[: len(_MAGIC)] == _MAGIC and (
                hashlib.sha256(body).hexdigest().encode() == content[len(_MAGIC) : head]
            ):
                yield int(path.name.split(".")[1]), path, body
            else:
                warnings.warn(
                    f"{path} is incomplete: the checkpoint before it is used.", stacklevel=4
                )

    def remove(self) -> None:
        """Delete the checkpoints of this process, and the folder if it is empty then."""
        for path in self._generations():
            path.unlink(missing_ok=True)
        # Another process may take the folder away at the same moment, or still have files in it.
        with suppress(OSError):
            self.folder.rmdir()
