"""The documentation site: `sphinx-build -W docs OUT`, with the extra `docs`."""

from __future__ import annotations

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

#: What is public: the names in `__all__` of these.
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
    "errors": "Errors",
}


def _write_reference() -> None:
    folder = HERE / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (room, title) in enumerate(ROOMS.items()):
        lines = [f"# {title}", "", f"`captum_classemb.{room}`", "", "```{eval-rst}"]
        lines += ["", f".. automodule:: captum_classemb.{room}"]
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
