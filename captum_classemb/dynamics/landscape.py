"""Loss over a plane through the weights, along filter-normalised directions (Li et al. 2018).

``variant="corrected"`` normalises each filter (the slices of a weight along its first dimension)
as Li et al. define it, with two exactly orthogonal directions and λ/2·Σw² beside the NLL.
``variant="paper"`` is what Park & Kim's code computes: norms along the first dimension, that is of
each input column, two independent directions, and λ·Σ‖w‖ (norms of the tensors, not squared).
In both, biases and the parameters of norms stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import Metric

from captum_classemb.dynamics.inference import Loss, labelled, mean_loss, output_in
from captum_classemb.dynamics.tracing.feature_maps import evaluating, without_wrapper
from captum_classemb.errors import InputError, NonFiniteError
from captum_classemb.functional.variant import Variant

Direction = dict[str, Tensor]


def _normalise_filters(direction: Tensor, weight: Tensor) -> Tensor:
    """Give each filter of the direction the norm of the weight's filter."""
    d, w = direction.flatten(1), weight.flatten(1)
    length = d.norm(dim=1, keepdim=True)
    scale: Tensor = w.norm(dim=1, keepdim=True) / length.clamp_min(torch.finfo(d.dtype).tiny)
    return (d * scale).view_as(direction)


def _normalise_columns(direction: Tensor, weight: Tensor) -> Tensor:
    """The published code's: norms over the first dimension, one for each position of the rest."""
    scale: Tensor = weight.norm(dim=0, keepdim=True) / (direction.norm(dim=0, keepdim=True) + 1e-7)
    return direction * scale


def _without(direction: Tensor, other: Tensor) -> Tensor:
    """Remove from each filter its part along the other's; a filter of one number vanishes."""
    d, o = direction.flatten(1), other.flatten(1)
    square = o.square().sum(1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)
    rest = d - (d * o).sum(1, keepdim=True) / square * o
    rest = torch.zeros_like(rest) if rest.shape[1] == 1 else rest
    return rest.view_as(direction)


def directions(
    parameters: Mapping[str, Tensor], variant: Variant = "corrected", seed: int = 0
) -> tuple[Direction, Direction]:
    """Two random directions in weight space, filter-normalised.

    Args:
        parameters: weights by name; those of fewer than two dimensions get no direction.
        variant: ``"paper"`` or ``"corrected"``.
        seed: the same seed gives the same directions on any device.

    Returns:
        Two directions by name. With ``"corrected"`` they are orthogonal within every filter.
    """
    generator = torch.Generator().manual_seed(seed)
    first: Direction = {}
    second: Direction = {}
    for name, weight in parameters.items():
        if weight.dim() < 2:
            first[name] = second[name] = torch.zeros_like(weight)
            continue
        w = weight.detach()
        draw = [torch.randn(w.shape, generator=generator).to(w) for _ in range(2)]
        if variant == "paper":
            first[name], second[name] = (_normalise_columns(d, w) for d in draw)
        else:
            first[name] = _normalise_filters(draw[0], w)
            second[name] = _normalise_filters(_without(draw[1], draw[0]), w)
    return first, second


def penalty(parameters: Mapping[str, Tensor], variant: Variant) -> Tensor:
    """The L2 term, before λ: Σw²/2, or the published Σ‖w‖."""
    if variant == "paper":
        return torch.stack([w.norm() for w in parameters.values()]).sum()
    return torch.stack([w.square().sum() for w in parameters.values()]).sum() / 2


def grid_points(points: int, extent: float) -> Tensor:
    """Coordinates of one axis, −extent … extent; an odd number of them holds the model itself."""
    if points < 2 or extent <= 0:
        raise InputError(
            f"A landscape needs at least 2 points a side and a positive extent, not {points} "
            f"and {extent}."
        )
    return torch.linspace(-extent, extent, points)


class LossLandscape(Metric):
    """Streaming NLL + L2 over a plane: every batch is evaluated at every point.

    The same images, with the same augmentation, therefore count at every point, and any number
    of batches can be added. Only points where the loss is finite are shown; the centre must be.

    ``update(images, labels)`` adds a batch; ``compute()`` gives points×points, the first
    direction along rows.

    Args:
        model: any classifier, used in eval mode; its weights are never changed.
        points: number of points a side.
        extent: how far the plane reaches, in units of the filters' own norms.
        weight_decay: λ.
        loss: the mean loss of a batch from (output, labels): binary cross-entropy, a regression's,
            ...; the NLL by default. A model with one logit needs one.
        variant: ``"paper"`` or ``"corrected"``.
        seed: of the directions.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    nll: Tensor
    images: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        points: int = 21,
        extent: float = 1.0,
        weight_decay: float = 0.0,
        loss: Loss | None = None,
        variant: Variant = "corrected",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if variant not in ("paper", "corrected"):
            raise InputError(f'variant is "paper" or "corrected", not {variant!r}.')
        model = without_wrapper(model)
        self.axis = grid_points(points, extent)
        self.weight_decay, self.variant = weight_decay, variant
        # Kept out of this module's children: a checkpoint of the sums need not hold the model.
        self._model, self._loss = [model], [loss]
        weights = {name: p.detach() for name, p in model.named_parameters()}
        self._directions = directions(weights, variant, seed)
        self.add_state(
            "nll", torch.zeros(points, points, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def weights_at(self, a: float, b: float) -> dict[str, Tensor]:
        """The weights at w + a·first + b·second."""
        first, second = self._directions
        return {
            name: p.detach() + a * first[name] + b * second[name]
            for name, p in self._model[0].named_parameters()
        }

    @torch.no_grad()
    def update(self, images: Tensor, labels: Tensor) -> None:
        """Evaluate one batch at every point."""
        model = self._model[0]
        losses = torch.empty_like(self.nll)
        with evaluating(model):
            for i, a in enumerate(self.axis.tolist()):
                for j, b in enumerate(self.axis.tolist()):
                    output = functional_call(model, self.weights_at(a, b), (images,))
                    mean = mean_loss(output_in(output, model), labels, self._loss[0])
                    losses[i, j] = mean.double() * len(images)
        centre = losses.shape[0] // 2
        if losses.shape[0] % 2 and not bool(torch.isfinite(losses[centre, centre])):
            raise NonFiniteError(
                "The loss is not finite at the model's own weights: check them and the inputs."
            )
        self.nll = self.nll + losses
        self.images = self.images + images.shape[0]

    def run(self, batches: Iterable[Any]) -> LossLandscape:
        """Update with every batch: (images, labels), as a ``DataLoader`` gives them."""
        for images, labels in labelled(batches, self._model[0]):
            self.update(images, labels)
        return self

    def compute(self) -> Tensor:
        """NLL + L2, points×points, the first direction along rows."""
        if not bool(self.images):
            raise InputError("A loss landscape needs at least one batch, but none was given.")
        loss = self.nll / self.images
        if self.weight_decay:
            for i, a in enumerate(self.axis.tolist()):
                for j, b in enumerate(self.axis.tolist()):
                    at = self.weights_at(a, b)
                    loss[i, j] += self.weight_decay * penalty(at, self.variant).double().cpu()
        return loss
