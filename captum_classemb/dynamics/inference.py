"""What several measurements share: logits, the loss, and which backend attention runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from captum_classemb.dynamics.tracing.feature_maps import evaluating
from captum_classemb.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from typing_extensions import Self


#: The mean loss of a batch, from what the model puts out and what it should.
Loss = Callable[[Tensor, Tensor], Tensor]


def output_of(model: nn.Module, images: Tensor) -> Tensor:
    """What a model puts out for images: see :func:`output_in`."""
    return output_in(model(images), model)


def output_in(output: Any, model: nn.Module) -> Tensor:
    """The tensor of an output: itself, its ``logits``, or the first of several.

    Raises:
        InputError: if there is none.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise InputError(
            f"{type(model).__name__} must put out a tensor, a tuple that begins with one, or "
            f"something with logits, but it gave {type(output).__name__}."
        )
    return output


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits B×C of any classifier, also of one that wraps them."""
    logits = output_of(model, images)
    if logits.dim() != 2:
        raise InputError(
            f"{type(model).__name__} must put out logits B×C, but it gave {tuple(logits.shape)}."
        )
    return logits


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that are no B class indices of the logits' C ≥ 2 classes."""
    classes = logits.shape[1]
    if classes == 1:
        raise InputError("The model has one logit, of which no class is the highest.")
    if labels.shape != logits.shape[:1]:
        raise InputError(
            f"{logits.shape[0]} images need as many labels, but labels of shape "
            f"{tuple(labels.shape)} were given."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"Labels are class indices, but {labels.dtype} were given.")
    if bool((labels < 0).any()) or bool((labels >= classes).any()):
        raise InputError(f"Labels must lie in 0–{classes - 1}, the model's {classes} classes.")


def mean_loss(output: Tensor, labels: Tensor, loss: Loss | None = None) -> Tensor:
    """The mean loss of a batch: cross-entropy by default.

    Raises:
        InputError: if labels and output do not fit, the model has one logit and no loss is given,
            or the loss is not one number.
    """
    if loss is None:
        if output.dim() != 2 or output.shape[1] == 1:
            raise InputError(
                f"Cross-entropy of an output of shape {tuple(output.shape)} says nothing: give a "
                "loss= of (output, labels), such as "
                "torch.nn.functional.binary_cross_entropy_with_logits."
            )
        check_labels(output, labels)
        return cross_entropy(output, labels.long())
    try:
        value = loss(output, labels)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"loss= takes no output of shape {tuple(output.shape)} with labels of shape "
            f"{tuple(labels.shape)}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"loss= has to give one number, the mean of a batch, but gave {found}.")
    return value.reshape(())


def images_in(batch: Any, model: nn.Module) -> Tensor:
    """The images of a batch, on the model's device: itself, its first part, or ``pixel_values``.

    Raises:
        InputError: if there are none.
    """
    found = batch
    if isinstance(batch, Mapping):
        found = batch.get("pixel_values", batch.get("images", batch.get("image")))
    elif isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    if not isinstance(found, Tensor):
        raise InputError(
            f"A batch is a tensor of images, a pair of images and labels, or a mapping with "
            f"pixel_values, but a {type(batch).__name__} was given."
        )
    like = next(model.parameters(), None)
    return found if like is None else found.to(like.device)


def labelled(batches: Iterable[Any], model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each batch, on the model's device.

    Raises:
        InputError: if a batch has no labels.
    """
    for batch in batches:
        images, labels = images_in(batch, model), None
        if isinstance(batch, Mapping):
            labels = batch.get("labels", batch.get("label"))
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            labels = batch[1]
        if not isinstance(labels, Tensor):
            raise InputError(
                f"Batches of images and labels are needed, but a {type(batch).__name__} without "
                "labels was given."
            )
        yield images, labels.to(images.device)


class LabelledMetric(Metric):
    """A metric of a model on images with labels."""

    def run(self, model: nn.Module, batches: Iterable[Any]) -> Self:
        """Update with every batch: (images, labels), as a ``DataLoader`` gives them."""
        for images, labels in labelled(batches, model):
            self.update(model, images, labels)
        return self


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
