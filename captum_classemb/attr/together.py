"""Several methods from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from captum_classemb.attr._base import PatchAttribution
from captum_classemb.attr._forward_pass import Needs, any_rows, run
from captum_classemb.attr._inputs import TensorOrTuple, clamped, forward_args, images, like_inputs
from captum_classemb.errors import InputError
from captum_classemb.functional.precision import upcast
from captum_classemb.vit import ViT
from captum_classemb.vit.memories import ForwardPass

__all__ = ["SharedPass", "attribute_together"]


class SharedPass:
    """One recorded forward pass of some images, which several methods read.

    Args:
        vit: the adapted model.
        methods: methods of it. Those that contract a recorded pass, and read the same rows and
            blocks, share one; others run their own.
        inputs: images, B×3×H×W.
        args: further arguments of the model's forward.
        also: what is read beside the methods.

    Raises:
        InputError: if a method is of another model, or the inputs are wrong.
    """

    def __init__(
        self,
        vit: ViT,
        methods: Sequence[PatchAttribution],
        inputs: Any,
        args: tuple[Any, ...] = (),
        also: Sequence[Needs] = (),
    ) -> None:
        if any(method.vit is not vit for method in methods):
            raise InputError("the methods are of several models: give each the same adapted model.")
        self.vit, self.args = vit, args
        self.pixels = images(vit, inputs, args, finite=False)
        self._needs = Needs(any_rows(vit), ())
        for needs in also:
            self._add(needs)
        self._sharing = [m for m in methods if self._add(m.needs())]

    def _add(self, needs: Needs | None) -> bool:
        both = None if needs is None else self._needs.united(needs)
        self._needs = both or self._needs
        return both is not None

    @cached_property
    def done(self) -> ForwardPass:
        """What is left of the pass, which runs when it is first asked for."""
        return run(self.vit, self._needs, self.pixels, self.args)

    def shares(self, method: PatchAttribution) -> bool:
        """Whether a method reads this pass."""
        return any(method is one for one in self._sharing)

    def maps(self, method: PatchAttribution, index: Tensor) -> Tensor:
        """The summed maps of classes: B×K×h×w, float32 or wider.

        Args:
            method: one of the methods.
            index: K classes, or those of each image, B×K; clamped, and refused by :meth:`finish`.
        """
        if not self.shares(method):
            if index.dim() == 1:
                return method.attribute_classes(self.pixels, index.tolist(), self.args)
            each = [method.attribute_patches(self.pixels, c, self.args) for c in index.unbind(1)]
            return torch.stack([patches.flatten(1, -3).sum(1) for patches in each], 1)
        index = index.to(self.done.logits.device)
        index = clamped(index, method.readout.num_classes, self.done.checks)
        read = method.class_maps if index.dim() == 1 else method.image_maps
        return method._on_grid(upcast(read(self.done, index)), self.pixels)

    def finish(self) -> None:
        """The checks of the pass, if it ran: the model computed what was read of it."""
        if "done" in vars(self):
            self.done.checks.finish()


def attribute_together(
    methods: Sequence[PatchAttribution],
    inputs: TensorOrTuple,
    target: Any = None,
    additional_forward_args: Any = None,
) -> list[TensorOrTuple]:
    """Maps of several methods of one model, of the same images and classes.

    Methods that read a recorded forward pass at the same rows and blocks share one:
    :class:`PatchImportance`, :class:`MemoryPatchImportance`, :class:`ClassEmbeddingGradient`,
    :class:`ClassEmbeddingProjection`, attention itself and linear probes. Others run their own.

    Args:
        methods (Sequence): methods of the same adapted model: give each the same
            :class:`~captum_classemb.vit.ViT`.
        inputs (Tensor or tuple[Tensor]): images, B×3×H×W.
        target (int, tuple, Tensor or list): the class explained. Default: None
        additional_forward_args (Any, optional): further arguments of the model's forward.
            Default: None

    Returns:
        list[Tensor]: what each method's ``attribute`` returns.

    Raises:
        InputError: if the methods are not of one adapted model, or the inputs are wrong.

    Examples:
        >>> import torch
        >>> from captum_classemb import MemoryPatchImportance, PatchImportance
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> vit, image = adapt(demo_vit()), torch.rand(1, 3, 64, 64)
        >>> both = [PatchImportance(vit), MemoryPatchImportance(vit)]
        >>> [maps.shape for maps in attribute_together(both, image, target=7)]
        [torch.Size([1, 3, 64, 64]), torch.Size([1, 3, 64, 64])]
    """
    if not methods:
        return []
    args = forward_args(additional_forward_args)
    shared = SharedPass(methods[0].vit, methods, inputs, args)
    found: list[TensorOrTuple] = []
    for method in methods:
        if shared.shares(method):
            index = method._early_targets(target, shared.pixels)[:, None]
            maps = method._to_pixels(shared.maps(method, index), shared.pixels)
            found.append(like_inputs(inputs, maps))
        else:
            found.append(method.attribute(inputs, target, additional_forward_args))
    shared.finish()
    return found
