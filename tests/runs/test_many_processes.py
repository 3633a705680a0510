"""Processes that get no batch at all: their number may exceed that of the batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from captum_classemb.models import demo_vit
from captum_classemb.runs import read_rows
from captum_classemb.studies.catalogue import all_studies

PROGRAM = Path(__file__).with_name("many_processes.py")
ROOT = Path(__file__).parents[2]


#: The Hessian of several checkpoints: as long as all others together.
SLOW = ("trajectory",)


def run_both(folder: Path, names: list[str]) -> Path:
    """Results of studies, in one process and in two of which one gets no batch."""
    (folder / "checkpoints").mkdir()
    for epoch in range(2):
        state = {name: value * (2 - epoch) for name, value in demo_vit().state_dict().items()}
        save_file(state, folder / f"checkpoints/epoch{epoch}.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for run, start in (("one", []), ("two", launcher)):
        words = [str(PROGRAM), str(folder / run), str(folder / "checkpoints"), *names]
        done = subprocess.run(
            [sys.executable, *start, *words],
            env=environment, timeout=600, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [name for name in all_studies() if name not in SLOW]
    return run_both(tmp_path_factory.mktemp("runs"), names)


@pytest.mark.parametrize("name", [name for name in all_studies() if name not in SLOW])
def test_a_process_without_a_batch_changes_nothing(name: str, runs: Path) -> None:
    """Two processes, one batch: the tables are those of one process."""
    check_same_tables(runs / "one" / name, runs / "two" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_nor_in_those_that_take_long(name: str, tmp_path: Path) -> None:
    runs = run_both(tmp_path, [name])
    check_same_tables(runs / "one" / name, runs / "two" / name)


def check_same_tables(one: Path, two: Path) -> None:
    tables = sorted(path.name for path in one.glob("*.csv"))
    assert tables and tables == sorted(path.name for path in two.glob("*.csv"))
    for table in tables:
        if table == "files.csv":
            continue
        first, second = read_rows(one / table), read_rows(two / table)
        assert [row._replace(value=0.0) for row in first] == [
            row._replace(value=0.0) for row in second
        ]
        for a, b in zip(first, second, strict=True):
            assert b.value == pytest.approx(a.value, rel=1e-6, nan_ok=True)
