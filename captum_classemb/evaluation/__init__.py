"""What judges attributions: removal curves, localisation, sanity checks, bootstrap intervals."""

from captum_classemb.evaluation.bootstrap import bootstrap_mean
from captum_classemb.evaluation.localisation import BoxLocalisation, MaskLocalisation
from captum_classemb.evaluation.removal_curves import RemovalCurve, removal_curves
from captum_classemb.evaluation.sanity import randomisation_check

__all__ = [
    "BoxLocalisation",
    "MaskLocalisation",
    "RemovalCurve",
    "bootstrap_mean",
    "randomisation_check",
    "removal_curves",
]
