"""Mini-batch CKA between all layers of one or two models, with the unbiased HSIC.

CKA = HSIC(K, L)/√(HSIC(K, K)·HSIC(L, L)), each HSIC averaged over batches before the division
(Nguyen et al. 2021, §3; unbiased HSIC of Song et al. 2012, eq. 5).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from captum_classemb.dynamics.inference import images_in
from captum_classemb.dynamics.tracing.traced_steps import TracedStep, find_steps, record_steps
from captum_classemb.errors import ClassEmbWarning, InputError, NonFiniteError

_FEWEST = 4
"""Images of a batch for which the statistic exists."""


def gram(features: Tensor) -> Tensor:
    """Linear kernel of one layer: B×… to B×B, features centred over the batch.

    Centring changes nothing in the unbiased HSIC; it keeps large means from costing digits.
    """
    x = features.flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    x = x - x.mean(0)
    return x @ x.T


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased HSIC between every pair of kernels.

    Args:
        first: L×B×B kernels.
        second: M×B×B kernels of the same B images.

    Returns:
        L×M.

    Raises:
        InputError: the batch is smaller than four images, for which the statistic does not exist.
    """
    n = first.shape[-1]
    if n < _FEWEST:
        raise InputError(
            f"The unbiased HSIC needs batches of at least {_FEWEST} images, but one of {n} was "
            "given."
        )

    def without_diagonal(kernels: Tensor) -> Tensor:
        diagonal = torch.eye(n, dtype=torch.bool, device=kernels.device)
        return kernels.double().masked_fill(diagonal, 0.0)

    k, m = without_diagonal(first), without_diagonal(second)
    rows_k, rows_m = k.sum(-1), m.sum(-1)
    product = k.flatten(1) @ m.flatten(1).T
    totals = rows_k.sum(-1)[:, None] * rows_m.sum(-1)[None]
    hsic = product + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows_k @ rows_m.T
    return hsic / (n * (n - 3))


class MinibatchCKA(Metric):
    """Streaming CKA between the layers of one or two models.

    ``update(first, second)`` takes one B×… tensor for each layer, of the same B images;
    ``compute()`` gives L×M. Where a layer's own HSIC is not positive (constant features, or a
    layer that tiny batches cannot resolve) its similarities are 0, never NaN.

    Args:
        first_layers: L.
        second_layers: M; 0 compares the first model with itself.

    Examples:
        >>> metric = MinibatchCKA(2)
        >>> layer = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
        >>> metric.update([layer, 2 * layer + 1])
        >>> metric.compute()
        tensor([[1., 1.],
                [1., 1.]])
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    cross: Tensor
    first: Tensor
    second: Tensor
    images: Tensor

    def __init__(self, first_layers: int, second_layers: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = (first_layers, second_layers or first_layers)
        self.add_state("cross", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name, layers in (("first", shape[0]), ("second", shape[1])):
            self.add_state(name, torch.zeros(layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, first: Sequence[Tensor], second: Sequence[Tensor] | None = None) -> None:
        """Add one batch: a B×… tensor per layer; ``second`` None compares ``first`` with itself."""
        k = torch.stack([gram(x) for x in first])
        m = k if second is None else torch.stack([gram(x) for x in second])
        if k.shape[-1] != m.shape[-1]:
            raise InputError(
                f"Both models must see the same images, but batches of {k.shape[-1]} and "
                f"{m.shape[-1]} were given."
            )
        if not bool(torch.isfinite(k).all()) or not bool(torch.isfinite(m).all()):
            raise NonFiniteError("A layer's features hold NaN or infinity: check the weights.")
        n = k.shape[-1]
        own_k = torch.stack([unbiased_hsic(x[None], x[None])[0, 0] for x in k])
        own_m = torch.stack([unbiased_hsic(x[None], x[None])[0, 0] for x in m])
        # Batches count by their images, so that a short last one weighs what it should.
        self.cross = self.cross + n * unbiased_hsic(k, m)
        self.first = self.first + n * own_k
        self.second = self.second + n * own_m
        self.images = self.images + n

    def compute(self) -> Tensor:
        """CKA of every pair of layers, L×M."""
        scale = (self.first.clamp_min(0)[:, None] * self.second.clamp_min(0)[None]).sqrt()
        return torch.where(scale > 0, self.cross / scale.clamp_min(1e-300), 0.0).float()


def cka(
    model: nn.Module, batches: Iterable[Any], other: nn.Module | None = None
) -> tuple[Tensor, tuple[TracedStep, ...], tuple[TracedStep, ...]]:
    """CKA between all steps of a model, or of two models that see the same images.

    Args:
        model: any vision model with spatial features.
        batches: B×3×H×W each, at least four images; or, as a ``DataLoader`` gives them, images
            and labels. A later batch of fewer than four images, the last one as a rule, is left
            out with a warning.
        other: a second model; None compares the model with itself.

    Returns:
        L×M, the first model's L steps, the second's M steps.
    """
    metric: MinibatchCKA | None = None
    steps: tuple[TracedStep, ...] = ()
    others: tuple[TracedStep, ...] = ()
    for batch in batches:
        images = images_in(batch, model)
        if metric is not None and len(images) < _FEWEST:
            warnings.warn(
                f"A batch of {len(images)} images is left out: the unbiased HSIC needs "
                f"{_FEWEST} or more.",
                ClassEmbWarning,
                stacklevel=2,
            )
            continue
        if metric is None:
            steps = find_steps(model, images)
            others = steps if other is None else find_steps(other, images)
            metric = MinibatchCKA(len(steps), len(others)).to(images.device)
        second = None if other is None else record_steps(other, images, others)
        metric.update(record_steps(model, images, steps), second)
    if metric is None:
        raise InputError("CKA needs at least one batch of images, but none was given.")
    return metric.compute(), steps, others
