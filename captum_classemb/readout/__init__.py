"""Maps from features of a Vision Transformer to class logits."""

from captum_classemb.readout.activation import Activation
from captum_classemb.readout.attention_pooled import AttentionPooled
from captum_classemb.readout.base import Readout
from captum_classemb.readout.class_embedding import ClassEmbedding, Part
from captum_classemb.readout.files import load_readout, save_readout
from captum_classemb.readout.function import FunctionReadout
from captum_classemb.readout.linear import Linear
from captum_classemb.readout.norm import Norm
from captum_classemb.readout.output_path import OutputPath
from captum_classemb.readout.placed import PlacedReadout
from captum_classemb.readout.probe import LinearProbe, ProbeHeads
from captum_classemb.readout.steps import Gate, LayerScale, Scale, Step
from captum_classemb.readout.text import TextEmbedding
from captum_classemb.readout.tuned import Translator, TunedLens
from captum_classemb.readout.vectors import read_vectors

__all__ = [
    "Activation",
    "AttentionPooled",
    "ClassEmbedding",
    "FunctionReadout",
    "Gate",
    "LayerScale",
    "Linear",
    "LinearProbe",
    "Norm",
    "Part",
    "OutputPath",
    "PlacedReadout",
    "ProbeHeads",
    "Readout",
    "Scale",
    "Step",
    "TextEmbedding",
    "Translator",
    "TunedLens",
    "load_readout",
    "read_vectors",
    "save_readout",
]
