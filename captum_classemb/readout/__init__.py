"""Maps from features of a Vision Transformer to class logits."""

from captum_classemb.readout.activation import Activation, GatedActivation
from captum_classemb.readout.attention_pooled import AttentionPooled, ProbePool, TimmLatentPool
from captum_classemb.readout.base import Readout
from captum_classemb.readout.class_embedding import ClassEmbedding, Part
from captum_classemb.readout.files import encode_readout, load_readout, save_readout
from captum_classemb.readout.function import FunctionReadout
from captum_classemb.readout.linear import Linear, SideBySide
from captum_classemb.readout.norm import Norm
from captum_classemb.readout.output_path import OutputPath
from captum_classemb.readout.placed import PlacedReadout
from captum_classemb.readout.probe import LinearProbe, ProbeHeads
from captum_classemb.readout.steps import Gate, LayerScale, Scale, Step
from captum_classemb.readout.text import TextEmbedding
from captum_classemb.readout.tuned import Translator, TunedLens

__all__ = [
    "Activation",
    "AttentionPooled",
    "ClassEmbedding",
    "FunctionReadout",
    "Gate",
    "GatedActivation",
    "LayerScale",
    "Linear",
    "LinearProbe",
    "Norm",
    "Part",
    "OutputPath",
    "PlacedReadout",
    "ProbeHeads",
    "ProbePool",
    "Readout",
    "Scale",
    "SideBySide",
    "Step",
    "TextEmbedding",
    "TimmLatentPool",
    "Translator",
    "TunedLens",
    "encode_readout",
    "load_readout",
    "save_readout",
]
