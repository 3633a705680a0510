"""Attention and MLP layers as key–value memories of classes (Vilas et al. §5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_classemb.errors import MissingExtraError
from captum_classemb.functional.variant import Variant
from captum_classemb.readout.vectors import VectorClasses
from captum_classemb.studies.group_means import GroupedMean, SumMetric
from captum_classemb.studies.memories.value_vectors import compositional, keys_agree


def random_classes(target: Tensor, indices: Sequence[int], classes: int, seed: int = 0) -> Tensor:
    """Another class for every image, which depends on the seed and the image's index alone.

    Args:
        target: the correct classes, B.
        indices: places of the images in the dataset, B.
        classes: C.
        seed: of the choice.

    Returns:
        int64, B; never the correct class.
    """
    steps = [
        np.random.Generator(np.random.Philox(key=[seed, index])).integers(1, classes)
        for index in indices
    ]
    return (target + torch.tensor(steps, device=target.device)) % classes


class KeyValueAgreement(GroupedMean):
    """Share of tokens for which one of the strongest memories stands for the correct class.

    Args:
        rows: R layers.
        variant: ``"corrected"``: the class is among the best classes of the memory's value
            vector; ``"paper"``: the memory is among the best memories of the class.
    """

    def __init__(self, rows: int, variant: Variant = "corrected") -> None:
        super().__init__(rows)
        self.variant = variant

    def agreeing(
        self, strongest: Sequence[Tensor], values: Sequence[VectorClasses], target: Tensor
    ) -> Tensor:
        """Which tokens agree: bool, R×B×N."""
        pairs = zip(strongest, values, strict=True)
        return torch.stack([keys_agree(s, v, target, self.variant) for s, v in pairs])

    def update(  # type: ignore[override]
        self,
        strongest: Sequence[Tensor],
        values: Sequence[VectorClasses],
        target: Tensor,
        members: Tensor,
    ) -> None:
        """Take in a batch.

        Args:
            strongest: of each layer, the memories with the highest coefficients, B×N×K.
            values: what each layer's value vectors stand for.
            target: class indices, B.
            members: 4×B×N, of :func:`~captum_classemb.studies.token_groups.membership`.
        """
        self.count_agreeing(self.agreeing(strongest, values, target), members)

    def count_agreeing(self, agreeing: Tensor, members: Tensor) -> None:
        """Take in which tokens agree, R×B×N."""
        super().update(agreeing, members)


class MemoryCompositionality(GroupedMean):
    """Share of (token, strong memory) pairs whose value vector predicts what the layer predicts.

    Where it is low, the layer's prediction is composed of several memories.

    Args:
        rows: R layers.
    """

    def update(  # type: ignore[override]
        self,
        strongest: Sequence[Tensor],
        values: Sequence[VectorClasses],
        top_class: Tensor,
        members: Tensor,
    ) -> None:
        """Take in a batch.

        Args:
            strongest: of each layer, the memories with the highest coefficients, B×N×K.
            values: what each layer's value vectors stand for.
            top_class: the top class of what each layer adds, R×B×N.
            members: 4×B×N, of :func:`~captum_classemb.studies.token_groups.membership`.
        """
        layers = zip(strongest, values, top_class, strict=True)
        same = [compositional(s, v, top).double().mean(-1) for s, v, top in layers]
        super().update(torch.stack(same), members)


class ValueAgreement(NamedTuple):
    """Each R, one number a layer.

    Attributes:
        value: mean over classes of the highest cosine with a value vector.
        control: the same for a randomly initialised model; NaN without one.
        p: of the Wilcoxon signed-rank test between the two, class by class; NaN without one.
        n: number of classes.
    """

    value: Tensor
    control: Tensor
    p: Tensor
    n: int


class ClassValueAgreement(SumMetric):
    """The highest cosine of a value vector with each class embedding; depends on weights alone.

    Args:
        rows: R layers.
        num_classes: C.
    """

    scores: Tensor
    controls: Tensor
    updates: Tensor

    def __init__(self, rows: int, num_classes: int) -> None:
        super().__init__()
        for name in ("scores", "controls"):
            self.add_state(name, torch.zeros(rows, num_classes, dtype=torch.float64), "sum")
        self.add_state("updates", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, scores: Tensor, controls: Tensor | None = None) -> None:
        """Take in a model.

        Args:
            scores: highest cosine of each class with a value vector of each layer, R×C.
            controls: the same for a randomly initialised model.
        """
        self.scores += scores
        self.controls += torch.full_like(self.controls, torch.nan) if controls is None else controls
        self.updates += 1

    def compute(self) -> ValueAgreement:
        """Means over classes, and the test of :func:`scipy.stats.wilcoxon`.

        Raises:
            MissingExtraError: if there is a control and scipy is not installed.
        """
        # Processes that update with the same weights are averaged, not added.
        scores, controls = self.scores / self.updates, self.controls / self.updates
        p = torch.full((scores.shape[0],), torch.nan, dtype=torch.float64)
        if not controls.isnan().any():
            try:
                from scipy.stats import wilcoxon
            except ImportError as error:
                raise MissingExtraError("scipy", "studies") from error
            for row, difference in enumerate((scores - controls).cpu().numpy()):
                p[row] = 1.0 if not difference.any() else float(wilcoxon(difference).pvalue)
        return ValueAgreement(scores.mean(1), controls.mean(1), p, scores.shape[1])
