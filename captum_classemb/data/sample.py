"""The one item type of all datasets with object masks."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

__all__ = ["CONTEXT", "IGNORED", "OBJECT", "Sample"]

#: Values of a mask.
CONTEXT: Final = 0
OBJECT: Final = 1
IGNORED: Final = 255


class Sample(NamedTuple):
    """An image, its class, and which of its pixels are the object.

    Attributes:
        image: 3×H×W, after the dataset's transform.
        label: class index.
        mask: H×W, uint8 of `CONTEXT`, `OBJECT` and `IGNORED`; None where nobody marked the object.
        name: what to call the image in tables and files; unique within its dataset.
        condition: what was done to the image, such as ``fog/3``; empty for an image as it is.
    """

    image: Tensor
    label: int
    mask: Tensor | None
    name: str
    condition: str = ""
