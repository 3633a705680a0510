"""The page: template, scripts, styles and numbers in one HTML file that needs no network."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from captum_classemb.atomic_file import write_atomically
from captum_classemb.data.marks import is_marked
from captum_classemb.errors import OutputError
from captum_classemb.explorer.contents import Contents, lighter

_LIBRARIES = ("d3.min.js", "plot.umd.min.js")
# In the order of their imports.
_MODULES = ("data", "colors", "numbers", "state", "stage", "patch", "heads", "waterfall", "app")
_MODULE_SYNTAX = re.compile(r"^import [^;]*;\n|^export (?=const|function|async|class)", re.M)

_LARGEST = 5_000_000
_NOTEBOOK_HEIGHT = 860
_PROBABILITY_STEPS = 65535


@dataclass(frozen=True)
class ExplorerPage:
    """A page to explore one image; a notebook shows it in place.

    Args:
        document: the HTML.
    """

    document: str

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the page to a file, which opens from disk in any browser.

        Args:
            path: of the file; an older page is written over.
            overwrite: write over any other file, too.

        Raises:
            OutputError: if it cannot be written, or another file is in its place.
        """
        path = Path(path)
        if not overwrite and path.exists() and not is_marked(path):
            raise OutputError(f"{path} is no page of captum-classemb: choose another place.")
        write_atomically(path, self.document.encode())

    def _repr_html_(self) -> str:
        # A frame of its own, so that neither the notebook's styles nor the page's leak.
        return (
            f'<iframe srcdoc="{html.escape(self.document)}" title="Explorer" '
            f'style="width:100%;height:{_NOTEBOOK_HEIGHT}px;border:0"></iframe>'
        )


def explorer_page(contents: Contents) -> ExplorerPage:
    """Lay the contents out as one self-contained page.

    Where it would be larger than 5 MB, single blocks and heads are left out for the last classes
    in focus, then summed maps for the least probable classes.

    Args:
        contents: all that is shown; :func:`captum_classemb.explain.explore` collects it from a
            model and an image.

    Examples:
        One block, 2×2 patches behind a CLS token, two classes, and maps of one method without
        heads:

        >>> from captum_classemb.explorer.contents import MethodMaps
        >>> from captum_classemb.explorer.quantise import quantise
        >>> parts = np.array([[0.5, 0.1], [0.2, 0.2]]).reshape(1, 1, 1, 2, 2)
        >>> method = MethodMaps(
        ...     key="mine",
        ...     title="My method",
        ...     caption="scores of mine",
        ...     whole="all blocks",
        ...     classes=np.array([1]),
        ...     maps=quantise(parts.sum((1, 2))),
        ...     parts=quantise(parts),
        ...     totals=parts.sum((-2, -1)),
        ... )
        >>> contents = Contents(
        ...     image=np.zeros((32, 32, 3), np.uint8),
        ...     grid=(2, 2),
        ...     title="black.png",
        ...     model="mine",
        ...     names=["cat", "dog"],
        ...     probabilities=np.array([0.25, 0.75]),
        ...     focus=[1],
        ...     targets=0,
        ...     top_classes=np.tile([1, 0], (1, 5, 1)),
        ...     top_probabilities=np.tile([0.75, 0.25], (1, 5, 1)),
        ...     ranks=np.zeros((1, 1, 5), int),
        ...     prefix=["CLS"],
        ...     methods=[method],
        ...     ledger=None,
        ...     colors=np.linspace(0, 255, 257).astype(np.uint8)[:, None].repeat(3, 1),
        ... )
        >>> page = explorer_page(contents)
        >>> "<title>black.png</title>" in page.document
        True
    """
    page = _page(contents)
    while len(page.document) > _LARGEST and (less := lighter(contents)) is not None:
        contents = less
        page = _page(contents)
    return page


def _page(contents: Contents) -> ExplorerPage:
    parts = {
        "title": html.escape(contents.title),
        "styles": _asset("page.css"),
        "licences": "\n".join(_asset(f"vendor/{name}.LICENSE") for name in ("d3", "plot")),
        "libraries": "\n".join(
            f"<script>{_asset(f'vendor/{name}')}</script>" for name in _LIBRARIES
        ),
        "script": "\n".join(_MODULE_SYNTAX.sub("", _asset(f"{name}.js")) for name in _MODULES),
        "data": base64.b64encode(_packed(contents)).decode(),
    }
    template = _asset("page.html")
    return ExplorerPage(re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


def _asset(name: str) -> str:
    return files("captum_classemb").joinpath("explorer", "assets", name).read_text("utf-8")


def _packed(contents: Contents) -> bytes:
    """A directory in JSON and the arrays it names, compressed; read by data.js."""
    arrays = _arrays(contents)
    directory: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        directory[name] = {"type": array.dtype.name, "shape": array.shape, "offset": offset}
        offset += -(-array.nbytes // 8) * 8
    head = json.dumps({**_facts(contents), "arrays": directory}).encode()
    # Arrays start at multiples of 8 bytes, as JavaScript's views of a buffer must.
    head += b" " * (-len(head) % 8)
    body = b"".join(array.tobytes() + bytes(-array.nbytes % 8) for array in arrays.values())
    return gzip.compress(len(head).to_bytes(8, "little") + head + body, 9, mtime=0)


def _facts(contents: Contents) -> dict[str, Any]:
    return {
        "title": contents.title,
        "model": contents.model,
        "image": _data_url(contents.image),
        "grid": contents.grid,
        "names": list(contents.names),
        "focus": [int(index) for index in contents.focus],
        "targets": contents.targets,
        "prefix": list(contents.prefix),
        "methods": [
            {
                "key": method.key,
                "title": method.title,
                "caption": method.caption,
                "whole": method.whole,
                "mapsZero": method.maps.zero,
                "partsZero": method.parts.zero,
            }
            for method in contents.methods
        ],
        "hasLedger": contents.ledger is not None,
        "notes": list(contents.notes),
    }


def _arrays(contents: Contents) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {
        "colors": contents.colors,
        "probabilities": contents.probabilities.astype("<f4"),
        "topClasses": _small(contents.top_classes),
        "topProbabilities": np.rint(contents.top_probabilities * _PROBABILITY_STEPS).astype("<u2"),
        "ranks": _small(contents.ranks),
    }
    for method in contents.methods:
        arrays |= {
            f"{method.key}.classes": method.classes.astype("<i4"),
            f"{method.key}.maps": method.maps.levels,
            f"{method.key}.mapSteps": method.maps.steps,
            f"{method.key}.parts": method.parts.levels,
            f"{method.key}.partSteps": method.parts.steps,
            f"{method.key}.totals": method.totals.astype("<f4"),
        }
    if contents.ledger is not None:
        for name, values in vars(contents.ledger).items():
            arrays[f"ledger.{name}"] = values.astype("<f4")
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _small(counts: npt.NDArray[np.integer]) -> npt.NDArray[Any]:
    return counts.astype("<u2" if counts.max(initial=0) < 65536 else "<u4")


def _data_url(image: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
