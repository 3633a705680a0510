"""What others would use: published methods with the same conventions, to compare with."""

from captum_classemb.attr.baselines.attention import AttentionRollout, RawAttention
from captum_classemb.attr.baselines.chefer import CheferRelevance
from captum_classemb.attr.baselines.cp_lrp import CPLRP
from captum_classemb.attr.baselines.legrad import LeGrad
from captum_classemb.attr.baselines.libra import LibraFullGrad
from captum_classemb.attr.baselines.linear_probe import LinearProbeImportance
from captum_classemb.attr.baselines.occlusion import TokenOcclusion

__all__ = [
    "AttentionRollout",
    "CPLRP",
    "CheferRelevance",
    "LeGrad",
    "LibraFullGrad",
    "LinearProbeImportance",
    "RawAttention",
    "TokenOcclusion",
]
