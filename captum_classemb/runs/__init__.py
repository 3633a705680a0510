"""The frame of studies over whole datasets: streaming, resumable, on one process or many."""

from captum_classemb.runs.catalogue import register_study, registered_studies
from captum_classemb.runs.runner import RunOptions, StudyResult, run_study
from captum_classemb.runs.study import Study
from captum_classemb.runs.subject import Subject
from captum_classemb.runs.tables import Row, read_rows, select

__all__ = [
    "Row",
    "RunOptions",
    "Study",
    "StudyResult",
    "Subject",
    "read_rows",
    "register_study",
    "registered_studies",
    "run_study",
    "select",
]
