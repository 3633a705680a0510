"""The studies that have been registered, by the names that the command line gives them."""

from __future__ import annotations

from typing import TypeVar

from captum_classemb.errors import InputError
from captum_classemb.runs.study import Study

_S = TypeVar("_S", bound=type[Study])

_registered: dict[str, type[Study]] = {}


def register_study(study: _S) -> _S:
    """Register a study under its ``name``: a decorator for subclasses of :class:`Study`.

    The command ``captum-classemb study`` then lists it among the package's own.

    Args:
        study: its constructor takes a :class:`~captum_classemb.runs.StudyConfig`, and the values of
            its ``parameters`` by name.

    Raises:
        InputError: for a study without a name, and for a name that another study has.
    """
    if not study.name:
        raise InputError(f"{study.__qualname__} has no name to be registered under.")
    other = _registered.setdefault(study.name, study)
    if (other.__module__, other.__qualname__) != (study.__module__, study.__qualname__):
        raise InputError(f"a study named {study.name!r} is registered already.")
    _registered[study.name] = study
    return study


def registered_studies() -> dict[str, type[Study]]:
    """Every registered study, sorted by name."""
    return dict(sorted(_registered.items()))
