"""Accuracy, negative log-likelihood and calibration error of predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from captum_classemb.dynamics.inference import LabelledMetric, check_labels, finite_loss, logits_of
from captum_classemb.dynamics.tracing.feature_maps import evaluating

# Bins of confidence of the expected calibration error, as published.
_BINS = 15


class Quality(NamedTuple):
    """Accuracy, NLL in nats and expected calibration error, each a scalar."""

    accuracy: Tensor
    nll: Tensor
    ece: Tensor


class Robustness(LabelledMetric):
    """Streaming :class:`Quality` of a model's predictions, on whatever images it is given.

    ``update(model, images, labels)`` takes one batch, ``compute()`` gives the quality. Constant
    memory: the calibration error needs three sums for each bin of confidence.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    nll: Tensor
    count: Tensor
    correct: Tensor
    confidence: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "correct", "confidence"):
            self.add_state(name, torch.zeros(_BINS, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Add one batch."""
        with evaluating(model):
            logits = logits_of(model, images)
        check_labels(logits, labels)
        loss = cross_entropy(logits.float(), labels.long(), reduction="sum")
        self.nll = self.nll + finite_loss(loss, "on this batch").double()
        confidence, predicted = logits.float().softmax(1).max(1)
        bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
        ones = torch.ones_like(confidence, dtype=torch.float64)
        right = (predicted == labels).double()
        for name, value in (
            ("count", ones), ("correct", right), ("confidence", confidence.double())
        ):  # fmt: skip
            state = getattr(self, name)
            setattr(self, name, state + torch.zeros_like(state).index_add_(0, bins, value))

    def compute(self) -> Quality:
        """The quality of all predictions so far."""
        images = self.count.sum()
        gap = (self.correct - self.confidence).abs().sum()
        return Quality(
            (self.correct.sum() / images).float(),
            (self.nll / images).float(),
            (gap / images).float(),
        )
