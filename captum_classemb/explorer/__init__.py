"""A page to explore one image: self-contained HTML, from plain arrays."""

from captum_classemb.explorer.page import explorer_page

__all__ = [
    "explorer_page",
]
