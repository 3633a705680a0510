"""Several methods from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from captum_classemb.attr._base import PatchAttribution
from captum_classemb.attr._forward_pass import ForwardPassAttribution, Needs, run
from captum_classemb.attr._inputs import TensorOrTuple, forward_args, images, like_inputs
from captum_classemb.errors import InputError

__all__ = ["attribute_together"]


def attribute_together(
    methods: Sequence[PatchAttribution],
    inputs: TensorOrTuple,
    target: Any = None,
    additional_forward_args: Any = None,
) -> list[TensorOrTuple]:
    """Maps of several methods of one model, of the same images and classes.

    Methods that contract a recorded forward pass and read the same rows and blocks share one:
    :class:`PatchImportance`, :class:`MemoryPatchImportance` and :class:`ClassEmbeddingGradient`.
    Others run their own.

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
    if len({id(method.vit) for method in methods}) != 1:
        raise InputError("the methods are of several models: give each the same adapted model.")
    args = forward_args(additional_forward_args)
    shared = [method for method in methods if isinstance(method, ForwardPassAttribution)]
    alike = [method for method in shared if method.needs()[:2] == shared[0].needs()[:2]]
    found: dict[int, Tensor] = {}
    if len(alike) > 1:
        pixels = images(alike[0].vit, inputs, args, finite=False)
        done = run(alike[0], _union([method.needs() for method in alike]), pixels, args)
        for method in alike:
            maps = method.one_class(done, method._targets(target, pixels))
            on_grid = method._on_grid(maps, pixels)
            found[id(method)] = method._shared_out(on_grid, pixels)
        done.checks.finish()
    return [
        like_inputs(inputs, found[id(method)])
        if id(method) in found
        else method.attribute(inputs, target, additional_forward_args)
        for method in methods
    ]


def _union(needs: Sequence[Needs]) -> Needs:
    """What serves all: attention and keys where one of them reads them."""
    return Needs(
        *needs[0][:2],
        attention=any(need.attention for need in needs),
        keys=any(need.keys for need in needs),
        calls=any(need.calls for need in needs),
    )
