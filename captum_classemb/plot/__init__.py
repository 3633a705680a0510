"""Figures, from plain tensors and arrays."""

from captum_classemb.plot.maps import DIVERGING, SEQUENTIAL, color_scale, overlay_map
from captum_classemb.plot.show import show

__all__ = [
    "DIVERGING",
    "SEQUENTIAL",
    "color_scale",
    "overlay_map",
    "show",
]
