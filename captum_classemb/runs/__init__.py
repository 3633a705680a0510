"""The frame of studies over whole datasets: streaming, resumable, on one process or many."""

from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.registry import register_study
from captum_classemb.runs.runner import RunOptions, StudyResult, run_study
from captum_classemb.runs.study import Study
from captum_classemb.runs.tables import Row, read_rows, select

__all__ = [
    "Row",
    "RunOptions",
    "Study",
    "StudyResult",
    "StudyConfig",
    "read_rows",
    "register_study",
    "run_study",
    "select",
]
