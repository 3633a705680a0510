"""Figures, from plain tensors and arrays."""

from captum_classemb.plot.maps import DIVERGING, SEQUENTIAL, color_scale, overlay_map

__all__ = [
    "DIVERGING",
    "SEQUENTIAL",
    "color_scale",
    "overlay_map",
]
