"""Accuracy when one block, attention or MLP is removed (Park & Kim 2022, Figures 10 and 11).

A residual branch is removed by putting zero in the place of what it adds, a whole block by
handing on what it was given. Blocks that change the size of the feature map cannot be removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classemb.dynamics.inference import LabelledMetric, check_labels, logits_of
from captum_classemb.dynamics.tracing.feature_maps import evaluating, without_wrapper
from captum_classemb.dynamics.tracing.traced_steps import StepKind, find_steps, record_steps
from captum_classemb.errors import UnsupportedModelError
from captum_classemb.hooks import after, hooks_removed


@dataclass(frozen=True)
class Lesion:
    """Something that can be removed.

    Attributes:
        kind: of the step whose branch goes, or ``"block"`` for all of a block.
        block: index of the block.
        depth: position among all steps, from 0 to 1.
        module: path of the module that is silenced or passed by.
        how: whether its output becomes zero or its own input.
    """

    kind: StepKind
    block: int
    depth: float
    module: str
    how: Literal["zero", "skip"]


def find_lesions(model: nn.Module, images: Tensor) -> tuple[Lesion, ...]:
    """What can be removed from a model without changing the size of anything.

    Args:
        model: any vision model with spatial features.
        images: B×3×H×W that it takes.

    Returns:
        First the residual branches in their order, then the whole blocks that have more than one
        branch or none of their own.

    Raises:
        UnsupportedModelError: nothing can be removed.
    """
    steps = find_steps(model, images)
    maps = record_steps(model, images[:1], steps)
    deepest = len(steps) - 1
    found: list[Lesion] = []
    blocks: list[Lesion] = []
    start = 0
    for i in range(1, len(steps)):
        step = steps[i]
        if step.branch is not None:
            found.append(Lesion(step.kind, step.block, i / deepest, step.branch, "zero"))
        if step.side == "output":
            same = maps[i].shape == maps[start].shape
            if same and (i - start > 1 or step.branch is None):
                blocks.append(Lesion("block", step.block, i / deepest, step.module, "skip"))
            start = i
    if not found and not blocks:
        raise UnsupportedModelError(
            f"Nothing can be removed from {type(model).__name__}: no step keeps the size of its "
            "feature map."
        )
    return (*found, *blocks)


def _silent(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, tuple) and value:
        return (_silent(value[0]), *value[1:])
    return value


@contextmanager
def without(model: nn.Module, lesion: Lesion) -> Iterator[None]:
    """Run the model as if the lesion's module did nothing."""

    def silence(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return _silent(output)

    def skip(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = next(x for x in [*args, *kwargs.values()] if isinstance(x, Tensor))
        return (given, *output[1:]) if isinstance(output, tuple) else given

    module = without_wrapper(model).get_submodule(lesion.module)
    with hooks_removed([after(module, silence if lesion.how == "zero" else skip)]):
        yield


class LesionAccuracy(LabelledMetric):
    """Streaming accuracy of the whole model and of the model without each part in turn.

    ``update(model, images, labels)`` takes one batch; ``compute()`` gives lesions+1 accuracies,
    the first of the whole model.

    Args:
        lesions: from :func:`find_lesions`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    images: Tensor

    def __init__(self, lesions: Sequence[Lesion], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lesions = tuple(lesions)
        shape = len(self.lesions) + 1
        self.add_state("correct", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Add one batch."""
        with evaluating(model):
            logits = logits_of(model, images)
            check_labels(logits, labels)
            self.correct[0] += (logits.argmax(1) == labels).sum()
            for i, lesion in enumerate(self.lesions):
                with without(model, lesion):
                    right = logits_of(model, images).argmax(1) == labels
                self.correct[i + 1] += right.sum()
        self.images = self.images + images.shape[0]

    def compute(self) -> Tensor:
        """Accuracy of the whole model, then without each part."""
        return self.correct.float() / self.images
