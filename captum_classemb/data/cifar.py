"""CIFAR-100, read through torchvision from a folder that already holds it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch.utils.data import Dataset

from captum_classemb.data.labels import Labelling
from captum_classemb.data.preprocess import Preprocess
from captum_classemb.data.sample import Sample
from captum_classemb.errors import DataError


def is_cifar100(root: Path) -> bool:
    """Whether a folder is, or holds, ``cifar-100-python``."""
    return root.name == "cifar-100-python" or (root / "cifar-100-python").is_dir()


class Cifar100(Dataset[Sample]):
    """The 10,000 test images of CIFAR-100; it has no masks.

    Args:
        root: the folder that holds ``cifar-100-python``, or that folder.
        transform: from a stored image to what the model reads.
        labelling: what the model's outputs are, 100 here.

    Raises:
        DataError: when the files are missing or damaged, or the model has not 100 classes.
    """

    layout = "cifar100"
    with_masks = 0

    def __init__(
        self, root: Path, transform: Preprocess, labelling: Labelling | None = None
    ) -> None:
        from torchvision.datasets import CIFAR100

        count = labelling.count if labelling else None
        if count not in (None, 100):
            raise DataError(f"CIFAR-100 has 100 classes, and the model {count}.")
        home = root.parent if root.name == "cifar-100-python" else root
        try:
            self._stored = CIFAR100(str(home), train=False, download=False)
        except RuntimeError as error:
            raise DataError(
                f"{home}/cifar-100-python is incomplete or damaged: unpack cifar-100-python.tar.gz "
                f"into {home} again."
            ) from error
        self.transform = transform

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        return list(self._stored.targets)

    def fingerprint(self) -> str:
        """SHA-256 of all pixels and labels."""
        digest = hashlib.sha256(self._stored.data.tobytes())
        digest.update(repr(self._stored.targets).encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        image, label = self._stored[index]
        pixels, _, _ = self.transform(image)
        return Sample(pixels, int(label), None, f"{index:05d}")
