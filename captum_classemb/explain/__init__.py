"""Explain photographs: files in; a figure, the maps and a record of each out."""

from captum_classemb.explain.compute import METHODS, Explainer, Explanation
from captum_classemb.explain.explore import Explore, explore
from captum_classemb.explain.html import write_page
from captum_classemb.explain.outputs import check_writable, write_together
from captum_classemb.explain.run import Options, Outcome, Run

__all__ = [
    "METHODS",
    "Explore",
    "Explainer",
    "Explanation",
    "Options",
    "Outcome",
    "Run",
    "check_writable",
    "explore",
    "write_page",
    "write_together",
]
