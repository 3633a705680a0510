"""The one item type of all datasets with object masks, and what a study asks of a dataset."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from torch import Tensor

from captum_classemb.data.images import Source

#: Values of a mask.
CONTEXT: Final = 0
OBJECT: Final = 1
IGNORED: Final = 255

#: The label of an image of which nobody says what it shows.
UNLABELLED: Final = -1


class Sample(NamedTuple):
    """An image, its class, and which of its pixels are the object.

    Attributes:
        image: 3×H×W, after the dataset's transform.
        label: class index, or `UNLABELLED`.
        mask: H×W, uint8 of `CONTEXT`, `OBJECT` and `IGNORED`; None where nobody marked the object.
        name: what to call the image in tables and files; unique within its dataset.
        condition: what was done to the image, such as ``fog/3``; empty for an image as it is.
        sources: the bytes that image and mask were decoded from, by file; none where they come
            from no file of their own.
    """

    image: Tensor
    label: int
    mask: Tensor | None
    name: str
    condition: str = ""
    sources: tuple[tuple[str, Source], ...] = ()


class StudyDataset(Protocol):
    """What a study asks of a dataset."""

    layout: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    @property
    def labels(self) -> list[int]:
        """The label of each image, without reading it."""

    @property
    def with_masks(self) -> int:
        """How many images have a mask or boxes."""

    def fingerprint(self) -> str:
        """A hash that another set of images or labels does not have."""
