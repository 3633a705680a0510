"""Metrics over batches: what tokens stand for, faithfulness and localisation of maps."""

from captum_classemb.metrics.grouped import ClassContextDifference, GroupedMean
from captum_classemb.metrics.groups import GROUPS, membership
from captum_classemb.metrics.identifiability import Accuracy, ClassIdentifiability
from captum_classemb.metrics.localisation import BoxLocalisation, MaskLocalisation
from captum_classemb.metrics.memories import (
    ClassValueAgreement,
    KeyValueAgreement,
    MemoryCompositionality,
)
from captum_classemb.metrics.probing import ProbeStatistics
from captum_classemb.metrics.projection import TokenReader, TokenScores, target_logits, token_scores
from captum_classemb.metrics.removal import RemovalCurve, RemovalCurves, removal_curves
from captum_classemb.metrics.residual import ClassSimilarityChangeRate, ResidualComposition

__all__ = [
    "GROUPS",
    "Accuracy",
    "BoxLocalisation",
    "ClassContextDifference",
    "ClassIdentifiability",
    "ClassSimilarityChangeRate",
    "ClassValueAgreement",
    "GroupedMean",
    "KeyValueAgreement",
    "MaskLocalisation",
    "MemoryCompositionality",
    "ProbeStatistics",
    "RemovalCurve",
    "RemovalCurves",
    "ResidualComposition",
    "TokenReader",
    "TokenScores",
    "membership",
    "removal_curves",
    "target_logits",
    "token_scores",
]
