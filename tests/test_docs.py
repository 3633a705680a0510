"""Every Python block of the documentation and the README runs, and the reference is complete."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```python( continuation)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _programs(page: Path) -> list[str]:
    """The page's programs: a block marked ``continuation`` goes on from the one before."""
    programs: list[str] = []
    for continued, code in _FENCE.findall(page.read_text()):
        if continued:
            programs[-1] += code
        else:
            programs.append(code)
    return programs


CASES = [
    pytest.param(page, code, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, code in enumerate(_programs(page))
]


@pytest.mark.parametrize(("page", "code"), CASES)
def test_blocks_run(page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "docs_block"})


def rooms() -> set[str]:
    """The modules that the reference documents."""
    for node in ast.parse((ROOT / "docs" / "conf.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS":
            return {f"captum_classemb.{room}" for room in ast.literal_eval(node.value)}
    raise AssertionError("docs/conf.py has no ROOMS")


def test_the_reference_documents_what_is_public() -> None:
    """Public is what a package names in `__all__`, and errors; at most 150 names."""
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "captum_classemb").rglob("__init__.py")
        if "__all__" in path.read_text()
    }
    assert rooms() == packages - {"captum_classemb"} | {"captum_classemb.errors"}
    names = {name for room in rooms() for name in importlib.import_module(room).__all__}
    assert len(names) <= 150, len(names)
    assert set(importlib.import_module("captum_classemb").__all__) - {"__version__"} <= names
