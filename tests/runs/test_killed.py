"""Whatever a run is stopped by, and however often: it ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs.killed import KILLS

PROGRAM = Path(__file__).with_name("killed.py")
ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """All files that hold numbers: run.json and figures say when and where they were made."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in {".csv", ".safetensors", ".npz"}
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_runs_that_are_killed_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """31 kills at moments drawn at random, over seven studies and maps of a data set."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path)],
        env=environment, timeout=1800, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in KILLS:
        whole, killed = contents(tmp_path / "whole" / name), contents(tmp_path / "killed" / name)
        assert whole and whole == killed, name
