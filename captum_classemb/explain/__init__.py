"""Explain photographs: files in; a figure, the maps and a record of each out."""

from captum_classemb.explain.explore import Explore, explore
from captum_classemb.explain.html import write_page
from captum_classemb.explain.maps import MapOptions, write_maps
from captum_classemb.explain.run import Options, Run
from captum_classemb.explain.saved_maps import SavedMaps

__all__ = [
    "Explore",
    "MapOptions",
    "Options",
    "Run",
    "SavedMaps",
    "explore",
    "write_maps",
    "write_page",
]
