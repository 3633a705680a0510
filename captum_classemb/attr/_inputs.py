"""Captum's conventions for inputs and targets, checked before any forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from captum_classemb.errors import InputError, TargetError
from captum_classemb.vit import ViT, verify
from captum_classemb.vit.checks import Checks

__all__ = [
    "TensorOrTuple",
    "clamped",
    "early_targets",
    "forward_args",
    "images",
    "late_targets",
    "like_inputs",
    "targets",
]

TensorOrTuple = TypeVar("TensorOrTuple", Tensor, tuple[Tensor, ...])


def images(
    vit: ViT,
    inputs: Tensor | tuple[Tensor, ...],
    args: tuple[Any, ...] = (),
    finite: bool = True,
) -> Tensor:
    """The batch of images in the model's dtype, once the reading of the model is verified.

    Args:
        vit: an adapted model.
        inputs: a batch, or a tuple of one.
        args: further arguments of the model's forward.
        finite: look for NaN now; a recorded pass finds it by what it does to the logits.

    Raises:
        InputError: if it is no batch of finite images that the model takes.
        UnsupportedModelError: if the model does not compute what its structure says.
    """
    if isinstance(inputs, (tuple, list)):
        if len(inputs) != 1:
            raise InputError(f"a tuple of {len(inputs)} inputs was given: the model takes one.")
        inputs = inputs[0]
    if not isinstance(inputs, Tensor):
        raise InputError(f"inputs are a {type(inputs).__qualname__}: a tensor is needed.")
    # Noise that a consumer adds in float32 must not reach a half-precision model.
    pixels = inputs.detach().to(vit.dtype)
    if pixels.dim() != 4:
        vit.check_inputs(pixels)
    if len(pixels) == 0:
        raise InputError("no image was given: the batch is empty.")
    verify(vit, pixels, args)
    vit.check_inputs(pixels, finite, args)
    return pixels


def like_inputs(inputs: TensorOrTuple, attributions: Tensor) -> TensorOrTuple:
    """A tuple if the inputs were one, as Captum's consumers expect."""
    attributions = attributions.detach().contiguous()
    if isinstance(inputs, (tuple, list)):
        return (attributions,)
    return attributions


def forward_args(additional: Any) -> tuple[Any, ...]:
    """The model's further arguments, wrapped as Captum wraps them.

    Positional ones; a dictionary at the end holds those with a name.
    """
    if additional is None:
        return ()
    return additional if isinstance(additional, tuple) else (additional,)


def targets(target: Any, batch: int, classes: int) -> Tensor:
    """One class index for each image: B, int64, on the host and in range.

    Args:
        target: as Captum defines it, also numpy integers and B×1 tensors.
        batch: B.
        classes: C.

    Raises:
        TargetError: if it is missing, out of range, or of the wrong length or type.
    """
    indices = [_index(item) for item in _items(target, classes)]
    if len(indices) == 1:
        indices = indices * batch
    _check_length(len(indices), batch)
    wrong = [index for index in indices if not 0 <= index < classes]
    if wrong:
        raise _out_of_range(wrong[0], classes)
    return torch.tensor(indices, dtype=torch.int64)


def early_targets(target: Any, batch: int, classes: int, device: torch.device) -> Tensor:
    """As :func:`targets`, but what lies on the model's accelerator stays there, unlooked at.

    :func:`late_targets` makes indices of both, once there are checks that tell what was wrong.
    """
    if not isinstance(target, Tensor) or target.device != device or device.type == "cpu":
        return targets(target, batch, classes)
    _check_form(target)
    index = target.detach().reshape(-1).to(torch.int64)
    if len(index) != 1:
        _check_length(len(index), batch)
    return index.expand(batch)


def late_targets(index: Tensor, classes: int, checks: Checks, device: torch.device) -> Tensor:
    """Indices on the device: those of the host are copied, its own clamped."""
    if index.device != device:
        return index.to(device, non_blocking=True)
    return index if device.type == "cpu" else clamped(index, classes, checks)


def clamped(index: Tensor, classes: int, checks: Checks) -> Tensor:
    """Indices in range; that they were is one of the checks at the end of the call."""
    inside = index.clamp(0, classes - 1)
    off = index - inside
    checks.require(
        off == 0, lambda: _out_of_range(int(index.flatten()[off.abs().argmax()]), classes)
    )
    return inside


def _out_of_range(index: int, classes: int) -> TargetError:
    return TargetError(f"target {index} is out of range: classes are 0 to {classes - 1}.")


def _check_length(given: int, batch: int) -> None:
    if given != batch:
        raise TargetError(
            f"{given} targets were given for {batch} images: give one class, or one an image."
        )


def _check_form(target: Tensor | np.ndarray[Any, Any]) -> None:
    if target.ndim > 2 or (target.ndim == 2 and target.shape[1] != 1):
        raise TargetError(
            f"targets have shape {tuple(target.shape)}: one class index an image is needed."
        )
    if not _holds_integers(target):
        raise TargetError(f"targets are {target.dtype}: integers are needed.")


def _items(target: Any, classes: int) -> Sequence[Any]:
    if target is None:
        if classes == 1:
            return [0]
        raise TargetError(f"no target was given: the model has {classes} classes, name one.")
    if isinstance(target, (Tensor, np.ndarray)):
        _check_form(target)
        return target.reshape(-1).tolist()
    if isinstance(target, list):
        if not target:
            raise TargetError("an empty list of targets was given: give one class an image.")
        return target
    return [target]


def _holds_integers(target: Tensor | np.ndarray[Any, Any]) -> bool:
    if isinstance(target, np.ndarray):
        return target.dtype.kind in "iu"
    fractions = target.is_floating_point() or target.is_complex()
    return not fractions and target.dtype != torch.bool


def _index(item: Any) -> int:
    if isinstance(item, tuple) and len(item) == 1:
        item = item[0]
    if isinstance(item, Tensor) and item.numel() == 1 and not item.is_floating_point():
        item = item.item()
    if isinstance(item, (int, np.integer)) and not isinstance(item, bool):
        return int(item)
    raise TargetError(f"target {item!r} is a {type(item).__qualname__}: a class index is needed.")
