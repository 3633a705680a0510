"""A page to explore one image: self-contained HTML, from plain arrays."""

from captum_classemb.explorer.contents import Contents, LedgerEntries, MethodMaps
from captum_classemb.explorer.page import ExplorerPage, explorer_page
from captum_classemb.explorer.quantise import Quantised, quantise

__all__ = [
    "Contents",
    "ExplorerPage",
    "LedgerEntries",
    "MethodMaps",
    "Quantised",
    "explorer_page",
    "quantise",
]
