"""What judges attributions: removal curves, localisation, sanity checks, bootstrap intervals."""

from captum_classemb.evaluation.bootstrap import bootstrap_mean
from captum_classemb.evaluation.localisation import BoxLocalisation, MaskLocalisation
from captum_classemb.evaluation.removal_metric import RemovalCurves
from captum_classemb.evaluation.sanity import randomisation_check

__all__ = [
    "BoxLocalisation",
    "MaskLocalisation",
    "RemovalCurves",
    "bootstrap_mean",
    "randomisation_check",
]
