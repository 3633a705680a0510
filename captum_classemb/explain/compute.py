"""What there is to know of a batch of images: maps, top classes, identifiability by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_classemb.attr import METHODS, PatchAttribution
from captum_classemb.attr._forward_pass import Needs, any_rows
from captum_classemb.attr.together import SharedPass
from captum_classemb.errors import InputError
from captum_classemb.functional.identifiability import identifiability
from captum_classemb.readout import Readout
from captum_classemb.vit import ViT
from captum_classemb.vit.record import ALL

Floats = npt.NDArray[np.floating]

TOP = 5

#: What is drawn unless methods are named: the package's own.
OWN = tuple(name for name, method in METHODS.items() if not (method.baseline or method.needs))


def check_methods(names: Sequence[str]) -> None:
    """See that methods are known and need nothing beside the model.

    Raises:
        InputError: if not, or if there are none.
    """
    known = [name for name, method in METHODS.items() if not method.needs]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(
            f"The method {', '.join(unknown) or '(none)'} is unknown: "
            f"give one or more of {', '.join(known)}."
        )


def _built(name: str, vit: ViT, readout: Readout | None) -> PatchAttribution:
    build = METHODS[name].build
    if readout is None:
        return build(vit)
    if "readout" not in signature(build).parameters:
        raise InputError(f"{name} takes no readout of its own: leave one of the two out.")
    return build(vit, readout)


def every_token(vit: ViT) -> Needs:
    """The hidden states of all tokens after every block."""
    return Needs(any_rows(vit), (), sites={"resid_post": ALL})


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
        methods: names of :data:`~captum_classemb.attr.METHODS`.
        targets: the classes explained in every image; without any, the model's first choice for
            each image.
        readout: instead of the model's own class embedding; of the same classes.

    Raises:
        InputError: if the readout has other classes than the model, or a method takes none.
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
        self.methods = {name: _built(name, vit, readout) for name in methods}

    def __call__(self, images: Tensor) -> list[Explanation]:
        """Explain images B×3×H×W.

        Raises:
            InputError: if the model does not take such images.
            NonFiniteError: if the model returns NaN or infinity.
        """
        vit = self.vit
        images = images.to(device=vit.device, dtype=vit.dtype)
        also = [every_token(vit)]
        shared = SharedPass(vit, list(self.methods.values()), images, also=also)
        recording, logits = shared.done.recording, shared.done.logits
        assert recording is not None
        batch = len(images)
        if self.targets:
            targets = torch.tensor(self.targets, device=vit.device)
        else:
            targets = logits.argmax(-1, keepdim=True)
        maps = {name: shared.maps(m, targets).float() for name, m in self.methods.items()}
        shared.finish()
        targets = targets.expand(batch, -1)
        known = self._identifiability(recording["resid_post"], targets)
        grid = vit.grid((images.shape[2], images.shape[3]))
        patches = known[..., vit.prefix_tokens :].unflatten(-1, grid)
        first = vit.readout.reads.start
        probabilities = logits.float().softmax(-1).cpu()
        arrays = {name: values.cpu().numpy() for name, values in maps.items()}
        return [
            Explanation(
                targets=tuple(targets[i].tolist()),
                probabilities=probabilities[i].numpy(),
                maps={name: values[i] for name, values in arrays.items()},
                patches=patches[i].numpy(),
                cls=known[i, ..., first].numpy() if first < vit.prefix_tokens else None,
            )
            for i in range(batch)
        ]

    def _identifiability(self, blocks: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Class identifiability of every token after every block: B×K×L×N."""
        by_block = []
        with torch.no_grad():
            for block, tokens in enumerate(blocks):
                logits = self.readout.at(block, "resid_post").project(tokens)
                each = [identifiability(logits, c[:, None]).cpu() for c in targets.unbind(1)]
                by_block.append(torch.stack(each, 1))
        return torch.stack(by_block, 2)
