"""What tests of the command line have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

MODEL = "test_vit"
Explain = Callable[..., Result]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def errors(result: Result) -> list[str]:
    return [line for line in result.output.splitlines() if line.startswith("Error: ")]


def assert_refused(result: Result, words: str, out: Path) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ")
    assert words in line
    assert not out.exists()
