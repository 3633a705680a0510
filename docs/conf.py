"""The documentation site: `sphinx-build -W docs OUT`, with the extra `docs`."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from pathlib import Path

import captum_classemb

HERE = Path(__file__).parent

project = "captum-classemb"
author = "captum-classemb contributors"
copyright = "captum-classemb contributors"
version = release = captum_classemb.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["figures"]
html_theme = "furo"
html_title = "captum-classemb"
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Notebooks are in the repository with their outputs, which tests keep up to date.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"

ROOMS = {
    "attr": "Attributions",
    "attr.baselines": "Attributions to compare with",
    "readout": "Readouts",
    "vit": "Reading models",
    "edit": "Editing a forward pass",
    "models": "Models by name",
    "data": "Data",
    "evaluation": "Judging attributions",
    "plot": "Figures",
    "explain": "Explaining files",
    "explorer": "The page to explore an image",
    "runs": "Running studies",
    "studies": "Studies",
    "dynamics": "How Vision Transformers work: measurements",
    "dynamics.tracing": "How Vision Transformers work: tracing any model",
    "dynamics.figures": "How Vision Transformers work: figures",
    "dynamics.studies": "How Vision Transformers work: studies",
    "functional": "Pure mathematics",
    "errors": "Errors",
}


def _modules(room: str) -> list[str]:
    """What documents the public names of a room: itself, or its modules where it names none."""
    name = f"captum_classemb.{room}"
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return [name]
    found = pkgutil.iter_modules(module.__path__)
    return [
        f"{name}.{entry.name}"
        for entry in found
        if not entry.name.startswith("_") and not entry.ispkg
    ]


def _write_reference() -> None:
    folder = HERE / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (room, title) in enumerate(ROOMS.items()):
        lines = [f"# {title}", "", f"`captum_classemb.{room}`", "", "```{eval-rst}"]
        for module in _modules(room):
            if module != f"captum_classemb.{room}":
                heading = module.rpartition(".")[2]
                lines += ["", heading, "-" * len(heading)]
            lines += ["", f".. automodule:: {module}"]
        page = folder / f"{number:02}_{room.replace('.', '_')}.md"
        page.write_text("\n".join([*lines, "```", ""]))


def _copy_tutorials() -> None:
    folder = HERE / "tutorials"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        shutil.copy(notebook, folder)


_write_reference()
_copy_tutorials()
