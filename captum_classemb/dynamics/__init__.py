"""*How Do Vision Transformers Work?* (Park & Kim, ICLR 2022): measurements of any vision model.

Importing this package makes AlterNet's names known to timm.
"""

from captum_classemb.dynamics.alternet import AlterNet, attention_blocks
from captum_classemb.dynamics.cka import MinibatchCKA
from captum_classemb.dynamics.depth import DepthMetrics, sign_agreement
from captum_classemb.dynamics.fourier import FourierAmplitude
from captum_classemb.dynamics.frequency_noise import FrequencyNoise
from captum_classemb.dynamics.hessian import HessianSpectrum, top_eigenvalues
from captum_classemb.dynamics.landscape import LossLandscape
from captum_classemb.dynamics.lesion import LesionAccuracy, find_lesions
from captum_classemb.dynamics.robustness import Robustness
from captum_classemb.dynamics.tracing.traced_steps import find_steps, record_steps, watch_steps
from captum_classemb.dynamics.variance import FeatureMapVariance

__all__ = [
    "AlterNet",
    "DepthMetrics",
    "FeatureMapVariance",
    "FourierAmplitude",
    "FrequencyNoise",
    "HessianSpectrum",
    "LesionAccuracy",
    "LossLandscape",
    "MinibatchCKA",
    "Robustness",
    "attention_blocks",
    "find_lesions",
    "find_steps",
    "record_steps",
    "sign_agreement",
    "top_eigenvalues",
    "watch_steps",
]
