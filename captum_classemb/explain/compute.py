"""What there is to know of a batch of images: maps, top classes, identifiability by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_classemb.attr import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.errors import InputError
from captum_classemb.functional.identifiability import identifiability
from captum_classemb.readout import Readout
from captum_classemb.vit import ViT, record

Floats = npt.NDArray[np.floating]

TOP = 5


class PatchMethod(Protocol):
    """What a method can do: summed maps of several classes, or unsummed ones of one class."""

    def attribute_classes(self, inputs: Tensor, classes: Sequence[int] | None) -> Tensor:
        """B×K×h×w."""
        ...

    def attribute_patches(self, inputs: Tensor, target: Tensor) -> Tensor:
        """B×…×h×w."""
        ...


@dataclass(frozen=True)
class Method:
    """One column of the figure.

    Args:
        title: over the column.
        caption: what its scores are.
        build: the attribution, from a model and, if wanted, a readout instead of its own.
        options: these options, for the record.
        whole: what its map sums.
        every_class: whether the maps of all classes cost little more than one.
    """

    title: str
    caption: str
    build: Callable[..., PatchMethod]
    options: Mapping[str, object]
    whole: str = "all blocks and heads"
    every_class: bool = True


PROJECTION = "class-embedding-projection"
MEMORY = "memory-patch-importance"

METHODS: dict[str, Method] = {
    "patch-importance": Method(
        "Importance",
        "evidence that attention carries, all blocks and heads",
        PatchImportance,
        {},
        every_class=False,
    ),
    PROJECTION: Method(
        "Projection",
        "class logit of each patch token, last block",
        ClassEmbeddingProjection,
        {"score": "logit", "site": "resid_post", "block": -1},
        whole="last block",
    ),
    "class-embedding-gradient": Method(
        "Gradient",
        "∂ score / ∂ attention, all blocks and heads",
        ClassEmbeddingGradient,
        {"objective": "paper", "blocks": "all", "heads": "all"},
    ),
    MEMORY: Method(
        "Memory",
        "share of the class logit brought by attention",
        MemoryPatchImportance,
        {"objective": "logit", "blocks": "all", "heads": "all"},
    ),
}


@dataclass(frozen=True)
class Explanation:
    """What was found for one image.

    Args:
        targets: the K classes explained.
        probabilities: of all C classes.
        maps: K×h×w for each method.
        patches: K×L×h×w, class identifiability of the patch tokens after each block.
        cls: K×L, that of the prefix token that the classifier reads; None if it reads none.
    """

    targets: tuple[int, ...]
    probabilities: Floats
    maps: dict[str, Floats]
    patches: Floats
    cls: Floats | None

    @property
    def top(self) -> list[int]:
        """The classes of highest probability, highest first."""
        order = np.argsort(-self.probabilities, kind="stable")
        return [int(index) for index in order[:TOP]]


class Explainer:
    """Explains batches with one model.

    Args:
        vit: the adapted model.
        methods: keys of `METHODS`.
        targets: the classes explained in every image; without any, the model's first choice for
            each image.
        readout: instead of the model's own class embedding; of the same classes.

    Raises:
        InputError: if the readout has other classes than the model.
    """

    def __init__(
        self,
        vit: ViT,
        methods: Sequence[str],
        targets: Sequence[int] = (),
        readout: Readout | None = None,
    ) -> None:
        self.vit = vit
        self.targets = tuple(targets)
        self.readout = vit.readout if readout is None else readout
        if self.readout.num_classes != vit.num_classes:
            raise InputError(
                f"the readout has {self.readout.num_classes} classes and the model "
                f"{vit.num_classes}: explain with one of the same classes."
            )
        self.methods = {name: METHODS[name].build(vit, readout) for name in methods}

    def __call__(self, images: Tensor) -> list[Explanation]:
        """Explain images B×3×H×W.

        Raises:
            InputError: if the model does not take such images.
            NonFiniteError: if the model returns NaN or infinity.
        """
        vit = self.vit
        vit.check_inputs(images)
        images = images.to(device=vit.device, dtype=vit.dtype)
        recording = record(vit, images, ["resid_post"])
        logits = recording.logits.float()
        if self.targets:
            targets = torch.tensor(self.targets).expand(len(images), -1)
        else:
            targets = logits.argmax(-1, keepdim=True).cpu()
        known = self._identifiability(recording["resid_post"], targets)
        grid = vit.grid((images.shape[2], images.shape[3]))
        patches = known[..., vit.prefix_tokens :].unflatten(-1, grid)
        first = vit.readout.reads.start
        maps = {name: self._maps(method, images, targets) for name, method in self.methods.items()}
        probabilities = logits.softmax(-1).cpu()
        return [
            Explanation(
                targets=tuple(targets[i].tolist()),
                probabilities=probabilities[i].numpy(),
                maps={name: values[i] for name, values in maps.items()},
                patches=patches[i].numpy(),
                cls=known[i, ..., first].numpy() if first < vit.prefix_tokens else None,
            )
            for i in range(len(images))
        ]

    def _identifiability(self, blocks: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Class identifiability of every token after every block: B×K×L×N."""
        by_block = []
        with torch.no_grad():
            for block, tokens in enumerate(blocks):
                logits = self.readout.at(block, "resid_post").project(tokens)
                each = [
                    identifiability(logits, column[:, None].to(logits.device)).cpu()
                    for column in targets.unbind(1)
                ]
                by_block.append(torch.stack(each, 1))
        return torch.stack(by_block, 2)

    def _maps(self, method: PatchMethod, images: Tensor, targets: Tensor) -> Floats:
        """B×K×h×w."""
        if self.targets:
            maps = method.attribute_classes(images, list(self.targets))
        else:
            patches = method.attribute_patches(images, targets[:, 0])
            maps = patches.flatten(1, -3).sum(1, keepdim=True)
        return maps.float().cpu().numpy()
