"""A page to explore one image: self-contained HTML, from plain arrays."""

from captum_classemb.explorer.page import ExplorerPage, explorer_page

__all__ = [
    "ExplorerPage",
    "explorer_page",
]
