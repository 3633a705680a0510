"""What a run keeps on disk while it goes on: checkpoints in two generations, a lock."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from captum_classemb.atomic_file import write_atomically
from captum_classemb.errors import ClassEmbWarning, OutputError

_GENERATIONS = 2
#: Of the SHA-256 that a file begins with, in hexadecimal digits.
_DIGEST_LENGTH = 64


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file, which the system releases when the process ends, even if it is killed.

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


class Checkpoint(NamedTuple):
    """The progress of one process.

    Attributes:
        number: the pass, counted from 0.
        done: batches of it that are in the sums.
        state: the sums.
    """

    number: int
    done: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one process, the last two of which are kept.

    A file is the SHA-256 of what ``torch.save`` wrote, and that. One that does not match (the
    machine went down while it was written) is passed over for the one before it.

    Args:
        folder: where they lie.
        rank: of the process; each has checkpoints of its own.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank

    def _files(self) -> list[Path]:
        """Newest first."""
        pattern = re.compile(rf"rank-{self.rank}\.\d{{3}}\.\d{{8}}\.ckpt")
        # Not asked first whether it exists: another process may take it away meanwhile.
        with suppress(FileNotFoundError, NotADirectoryError):
            found = [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
            return sorted(found, reverse=True)
        return []

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and drop all but the last two.

        Raises:
            OutputError: if it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint._asdict(), buffer)
        # Sums may be large: they are not copied once more.
        body = buffer.getbuffer()
        digest = hashlib.sha256(body).hexdigest().encode()
        name = f"rank-{self.rank}.{checkpoint.number:03d}.{checkpoint.done:08d}.ckpt"
        write_atomically(self.folder / name, digest, body)
        for old in self._files()[_GENERATIONS:]:
            old.unlink(missing_ok=True)

    def load(self) -> Iterator[Checkpoint]:
        """The checkpoints that are whole, newest first."""
        for path in self._files():
            content = memoryview(path.read_bytes())
            digest, body = bytes(content[:_DIGEST_LENGTH]), content[_DIGEST_LENGTH:]
            if hashlib.sha256(body).hexdigest().encode() != digest:
                warnings.warn(
                    f"{path} is incomplete: the checkpoint before it is used.",
                    ClassEmbWarning,
                    stacklevel=2,
                )
                continue
            stored = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
            yield Checkpoint(**stored)

    def remove(self) -> None:
        """Delete the checkpoints of this process, and the folder if it is empty then."""
        for path in self._files():
            path.unlink(missing_ok=True)
        # Another process may take the folder away at the same moment, or still have files in it.
        with suppress(OSError):
            self.folder.rmdir()
