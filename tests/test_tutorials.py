"""The tutorials: text and notebook say the same, outputs are there, and all of it runs."""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "tutorials"
TEXTS = sorted(FOLDER.glob("*.py"))
_SECONDS = 300
"""For one notebook; a machine that runs many tests at once is several times slower than one."""


def _cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_notebook_is_that_of_the_text(text: Path) -> None:
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    assert _cells(notebook) == _cells(jupytext.read(text))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count, cell.source
            assert not any(output.get("name") == "stderr" for output in cell.outputs)
    assert text.with_suffix(".ipynb").stat().st_size < 1_500_000


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_tutorial_runs(text: Path, tmp_path: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CLASSEMB_")},
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "OMP_NUM_THREADS": "1",
    }
    client = NotebookClient(
        jupytext.read(text), timeout=_SECONDS, kernel_name="python3", resources={}
    )
    client.resources["metadata"] = {"path": str(tmp_path)}
    client.execute(env=environment)
