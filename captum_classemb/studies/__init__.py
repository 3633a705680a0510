"""The studies of Vilas et al. (2023), and what they fit: a dataset in, tables and figures out."""

from captum_classemb.studies.catalogue import all_studies
from captum_classemb.studies.fitting import (
    fit_linear_probe,
    fit_logistic_probe,
    fit_tuned_lens,
)
from captum_classemb.studies.model_study import ModelStudy

__all__ = [
    "ModelStudy",
    "all_studies",
    "fit_linear_probe",
    "fit_logistic_probe",
    "fit_tuned_lens",
]
