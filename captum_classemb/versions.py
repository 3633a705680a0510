"""Versions of whatever numbers depend on, to be kept beside them."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = (
    "captum-classemb", "torch", "captum", "timm", "torchmetrics", "numpy", "matplotlib", "pillow",
    "torchvision", "transformers", "scipy", "grad-cam", "legrad_torch", "lxt",
)  # fmt: skip


def versions() -> dict[str, str]:
    """The version of Python and of each package; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
