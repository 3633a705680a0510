"""What the attributions of images share: adapted model, pixels from patches, Captum's manners."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_classemb.attr._inputs import (
    TensorOrTuple,
    early_targets,
    forward_args,
    images,
    late_targets,
    like_inputs,
    targets,
)
from captum_classemb.errors import InputError
from captum_classemb.functional.grid import spread
from captum_classemb.functional.precision import upcast
from captum_classemb.readout import Readout
from captum_classemb.vit import ViT, adapt
from captum_classemb.vit.active_edits import all_patches
from captum_classemb.vit.memories import ForwardPass

if TYPE_CHECKING:
    from captum_classemb.attr._forward_pass import Needs

__all__ = ["PatchAttribution", "check_classes", "choose"]


_OPTIONS = ("objective", "score", "site", "block", "batch_size")


def choose(indices: Sequence[int] | int | None, count: int, name: str) -> list[int]:
    """The chosen blocks or heads as non-negative indices.

    Raises:
        InputError: if one is no index, out of range or named twice, or none is chosen.
    """
    if indices is None:
        return list(range(count))
    named = list(indices) if isinstance(indices, Iterable) else [indices]
    if not named:
        raise InputError(f"no {name} was chosen: leave {name}s out for all {count}.")
    chosen: list[int] = []
    for index in named:
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            kind = type(index).__qualname__
            raise InputError(f"{name} {index!r} is a {kind}: an index is needed.")
        if not -count <= index < count:
            raise InputError(f"{name} {index} is out of range: the model has {count}.")
        if index % count in chosen:
            raise InputError(f"{name} {index % count} was chosen twice.")
        chosen.append(int(index) % count)
    return chosen


def check_classes(vit: ViT, option: str) -> None:
    """Raise InputError if a probability of one text is asked for: it is 1 whatever the image."""
    if "probability" in option and len(getattr(vit, "classes", (0, 0))) == 1:
        raise InputError(
            f"{option!r} needs more than one class to set it against: name others, or take 'logit'."
        )


class PatchAttribution(Attribution):  # type: ignore[misc]
    """An attribution that scores patches and spreads the scores over their pixels.

    Args:
        model: a supported Vision Transformer, or one that is adapted already.
        readout: what maps features to logits, or a module that reads the pooled tokens; the
            model's own class embedding by default.
    """

    #: False where a recorded pass tells what is not finite at its end.
    _LOOKS_FOR_NAN = True

    def __init__(self, model: nn.Module, readout: nn.Module | None = None) -> None:
        self.vit: ViT = adapt(model)
        super().__init__(self.vit)
        self._given = (self.vit.read_with(readout),)
        if readout is None:
            _ = self.vit.readout

    @property
    def readout(self) -> Readout:
        """What maps features to logits: as given, or the model's own as it is now."""
        given = self._given[0]
        return self.vit.readout if given is None else given

    def options(self) -> dict[str, Any]:
        """What was chosen of the options of the method, by name."""
        return {name: getattr(self, name) for name in _OPTIONS if hasattr(self, name)}

    def __repr__(self) -> str:
        """The method, its model and its options."""
        listed = "".join(f", {name}={value!r}" for name, value in self.options().items())
        return f"{type(self).__name__}({type(self.vit.model).__qualname__}{listed})"

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self, inputs: TensorOrTuple, target: Any = None, additional_forward_args: Any = None
    ) -> TensorOrTuple:
        """Scores of pixels.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            target (int, tuple, Tensor or list): the class explained, one for all images or one
                for each. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None

        Returns:
            Tensor or tuple[Tensor]: the shape of ``inputs``. A patch's score is shared evenly
            among its pixels and channels, so sums are kept; scores that are no sums are repeated.

        Raises:
            InputError: if ``inputs`` is no batch of finite images that the model takes.
            TargetError: if the target is missing, out of range, or of the wrong length or type.
        """
        args = forward_args(additional_forward_args)
        pixels = images(self.vit, inputs, args, finite=self._LOOKS_FOR_NAN)
        patches = self._patch_scores(pixels, target, args)
        return like_inputs(inputs, self._to_pixels(upcast(patches), pixels))

    def attribute_patches(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """Scores of patches, nothing summed: B×L'×H'×h×w for the chosen blocks and heads.

        Prefix tokens are left out. Arguments and errors as for :meth:`attribute`.
        """
        args = forward_args(additional_forward_args)
        return upcast(
            self._patch_scores(
                images(self.vit, inputs, args, finite=self._LOOKS_FOR_NAN), target, args
            )
        )

    @abstractmethod
    def attribute_classes(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        classes: Sequence[int] | None = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """The summed map of every class at once, from one forward pass.

        Args:
            inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
            classes (Sequence[int], optional): the K classes wanted; all C if None. Default: None
            additional_forward_args (Any, optional): further arguments of the model's forward.
                Default: None

        Returns:
            Tensor: B×K×h×w.
        """

    @abstractmethod
    def _patch_scores(self, pixels: Tensor, target: Any, args: tuple[Any, ...]) -> Tensor:
        """B×L'×H'×h×w, or B×1×h×w for a method without blocks and heads."""

    @property
    def multiplies_by_inputs(self) -> bool:
        """False: no score is multiplied by the input."""
        return False

    # -- What several methods may read of one recorded forward pass

    def needs(self) -> Needs | None:
        """What is read of a recorded forward pass; None for a method that runs its own."""
        return None

    def class_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        """The maps of the classes ``index`` (K), from what :meth:`needs` names: B×K×(N − P)."""
        return self.image_maps(done, index.expand(len(done.logits), -1))

    def image_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        """The maps of classes of each image, ``index`` B×K: B×K×(N − P)."""
        raise NotImplementedError

    def _early_targets(self, target: Any, pixels: Tensor) -> Tensor:
        return early_targets(target, len(pixels), self.readout.num_classes, pixels.device)

    def _late_targets(self, done: ForwardPass, index: Tensor) -> Tensor:
        return late_targets(index, self.readout.num_classes, done.checks, done.logits.device)

    def _targets(self, target: Any, pixels: Tensor) -> Tensor:
        return targets(target, len(pixels), self.readout.num_classes).to(pixels.device)

    def _classes(self, classes: Sequence[int] | None, pixels: Tensor) -> Tensor:
        if classes is None:
            return torch.arange(self.readout.num_classes, device=pixels.device)
        wanted = list(classes)
        return targets(wanted, len(wanted), self.readout.num_classes).to(pixels.device)

    def _to_grid(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """…×N scores of tokens to …×h×w scores of patches."""
        return self._on_grid(tokens[..., self.vit.prefix_tokens :], pixels)

    def _on_grid(self, patches: Tensor, pixels: Tensor) -> Tensor:
        """…×(N − P) scores of patches to …×h×w."""
        h, w = self.vit.grid((pixels.shape[2], pixels.shape[3]))
        patches = all_patches(patches, h * w)
        if patches.shape[-1] != h * w:
            raise InputError(
                f"the model made {patches.shape[-1]} patches of an image of "
                f"{pixels.shape[2]}×{pixels.shape[3]} pixels where {h}×{w} were expected."
            )
        return patches.reshape(*patches.shape[:-1], h, w)

    def _to_pixels(self, patches: Tensor, pixels: Tensor) -> Tensor:
        return self._shared_out(patches.flatten(1, -3).sum(1), pixels)

    def _shared_out(self, maps: Tensor, pixels: Tensor) -> Tensor:
        """B×h×w scores of patches shared among their pixels and channels."""
        size = (pixels.shape[2], pixels.shape[3])
        return spread(maps, size, pixels.shape[1], self.vit.patch_pixels(size))
