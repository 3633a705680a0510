"""Experiments over whole datasets: one a file, streaming, resumable, distributed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_classemb.studies.catalogue import registry
    from captum_classemb.studies.fitting import (
        fit_linear_probe,
        fit_logistic_probe,
        fit_tuned_lens,
    )
    from captum_classemb.studies.model_study import ModelStudy, Subject
    from captum_classemb.studies.runner import RunOptions, StudyResult, run_study
    from captum_classemb.studies.study import Study
    from captum_classemb.studies.tables import Row, read_rows, select

__all__ = [
    "ModelStudy",
    "Row",
    "RunOptions",
    "Study",
    "StudyResult",
    "Subject",
    "fit_linear_probe",
    "fit_logistic_probe",
    "fit_tuned_lens",
    "read_rows",
    "registry",
    "run_study",
    "select",
]

_PLACES = {
    "ModelStudy": "model_study",
    "Subject": "model_study",
    "fit_linear_probe": "fitting",
    "fit_logistic_probe": "fitting",
    "fit_tuned_lens": "fitting",
    "registry": "catalogue",
    "RunOptions": "runner",
    "StudyResult": "runner",
    "run_study": "runner",
    "Study": "study",
    "Row": "tables",
    "read_rows": "tables",
    "select": "tables",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that the command line answers before torch is imported.
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
