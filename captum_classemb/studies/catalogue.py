"""All studies: those of this package, of both papers, and those registered from outside."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from captum_classemb import dynamics, studies
from captum_classemb.runs import Study
from captum_classemb.runs.registry import registered_studies


def _import_modules(package: ModuleType) -> None:
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def all_studies() -> dict[str, type[Study]]:
    """Every study by the name that the command line gives it."""
    for package in (studies, dynamics):
        _import_modules(package)
    return registered_studies()
