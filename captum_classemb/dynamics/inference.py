"""What several measurements share: logits, the loss, and which backend attention runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_classemb.dynamics.tracing.feature_maps import evaluating
from captum_classemb.errors import InputError, NonFiniteError


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits B×C of any model, also of one that wraps them."""
    output = model(images)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise InputError(
            f"{type(model).__name__} must put out logits B×C, but it gave "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}."
        )
    return logits


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that are no B class indices of the logits' C classes."""
    classes = logits.shape[1]
    if labels.shape != logits.shape[:1]:
        raise InputError(
            f"{logits.shape[0]} images need as many labels, but labels of shape "
            f"{tuple(labels.shape)} were given."
        )
    if bool((labels < 0).any()) or bool((labels >= classes).any()):
        raise InputError(f"Labels must lie in 0–{classes - 1}, the model's {classes} classes.")


def finite_loss(value: Tensor, what: str) -> Tensor:
    """The value itself, or an error if it is NaN or infinite."""
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"The loss is not finite {what}: check the weights and the inputs.")
    return value


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Eval mode, every parameter requiring gradients, attention with a double backward.

    Fused attention kernels have a first derivative only; the mathematical one has all of them.
    """
    parameters = list(model.parameters())
    flags = [p.requires_grad for p in parameters]
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        try:
            for p in parameters:
                p.requires_grad_(True)
            yield
        finally:
            for p, flag in zip(parameters, flags, strict=True):
                p.requires_grad_(flag)
