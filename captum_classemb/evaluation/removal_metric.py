"""Removal curves of a method's maps, gathered over batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from captum_classemb.errors import InputError
from captum_classemb.evaluation.areas import area
from captum_classemb.evaluation.removal_curves import (
    Curves,
    Perturbation,
    curves_in_orders,
    removal_curves,
)
from captum_classemb.evaluation.removal_order import MEASURES
from captum_classemb.vit import adapt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SIDES", "RandomRemoval", "RemovalCurves"]

#: The two orders in which patches go: least important first, and most important first.
SIDES = ("negative", "positive")


class RemovalCurves(Metric):
    """How a model's prediction holds as patches are removed in the order of maps.

    A faithful map keeps the prediction long where the least important patches go first (the
    negative order), and loses it at once where the most important do (the positive order): the gap
    between the two areas is large.

    Args:
        steps: evenly spaced points after the unperturbed one. With as many steps as patches one
            goes at a time.
        perturbation: ``"tokens"`` takes patches out of the sequence, ``"mean"`` paints them in the
            image's mean colour, ``"blur"`` blurs them.
        kwargs: further arguments of ``torchmetrics.Metric``.

    Examples:
        >>> from captum_classemb import PatchImportance
        >>> from captum_classemb.models import demo_vit
        >>> model, images, target = demo_vit(), torch.rand(2, 3, 64, 64), torch.tensor([3, 4])
        >>> metric = RemovalCurves(steps=4)
        >>> metric.update(model, images, PatchImportance(model).attribute(images, target), target)
        >>> 0 <= float(metric.compute()["accuracy/negative"]) <= 1
        True
    """

    full_state_update = False
    values: list[Tensor]
    removed: Tensor
    patches: Tensor

    def __init__(
        self, steps: int = 20, perturbation: Perturbation = "tokens", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.steps = steps
        self.perturbation: Perturbation = perturbation
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("patches", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("removed", torch.zeros(steps + 1, dtype=torch.int64), dist_reduce_fx="max")

    def update(self, model: nn.Module, images: Tensor, maps: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            model: a supported Vision Transformer.
            images: B×3×H×W.
            maps: importance of the patches, B×h×w; or attributions of the images' shape, which are
                summed over each patch.
            target: the class measured, B.

        Raises:
            InputError: if maps or targets do not fit the images, or the images have another number
                of patches than those before.
            NonFiniteError: if a score is NaN or infinite.
            UnsupportedModelError: if tokens cannot be taken out of this model exactly.
        """
        options: Any = {"steps": self.steps, "perturbation": self.perturbation}
        self._add(removal_curves(model, images, maps, target, **options))

    def _add(self, curves: Curves) -> None:
        removed = curves.removed.to(self.removed.device)
        if self.values and not torch.equal(self.removed, removed):
            raise InputError("all images of one removal curve need the same number of patches.")
        self.patches = torch.tensor(curves.patches, device=self.removed.device)
        self.removed = removed
        self.values.append(curves.values)

    def curves(self) -> Curves:
        """The curves of all images so far, one by one."""
        whole = self.values if isinstance(self.values, Tensor) else torch.cat(self.values)
        return Curves(self.removed, whole, int(self.patches))

    def images(self) -> dict[str, Tensor]:
        """For each image the areas under its own curves: the ordinary ones of :meth:`compute`."""
        return _areas(self.curves().values, self.removed)

    def compute(self) -> dict[str, Tensor]:
        """Areas under the curves averaged over images, as float64.

        Returns:
            for each measure m (``"accuracy"``, ``"probability"``, ``"logit"``) the trapezoid areas
            ``"m/negative"``, ``"m/positive"`` and their difference ``"m/gap"``; for accuracy and
            probability also ``"m/paper_negative"`` and ``"m/paper_positive"``, as Vilas et al.
            (2023) publish them.
        """
        mean = self.curves().values.double().mean(0)
        result = _areas(mean, self.removed)
        for index, measure in enumerate(MEASURES[:2]):
            published = area(self.removed, mean[..., index], int(self.patches), "paper")
            for side, value in zip(SIDES, published, strict=True):
                result[f"{measure}/paper_{side}"] = value
        return result

    def plot(self, ax: Axes | None = None, measure: str = "accuracy") -> tuple[Figure, Axes]:
        """Both curves, averaged over images, against the share of patches removed.

        Args:
            ax: where to draw; a new figure by default.
            measure: ``"accuracy"``, ``"probability"`` or ``"logit"``.

        Raises:
            InputError: for an unknown measure.
        """
        if measure not in MEASURES:
            raise InputError(f"measure {measure!r} is none of {', '.join(MEASURES)}.")
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(4.6, 3.2), layout="constrained").subplots()
        share = (self.removed / self.removed[-1]).tolist()
        values = self.curves().values[..., MEASURES.index(measure)].double().mean(0).tolist()
        gap = float(self.compute()[f"{measure}/gap"])
        ax.fill_between(share, *values, color="#0072B2", alpha=0.12, linewidth=0)
        for line, style, name in zip(values, ("-", "--"), ("least", "most"), strict=True):
            ax.plot(share, line, style, color="#0072B2", label=f"{name} important first")
        ax.set(xlabel="share of patches removed", ylabel=measure, title=f"gap {gap:.3f}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9)
        figure: Any = ax.figure
        return figure, ax


class RandomRemoval(RemovalCurves):
    """The same for patches that go in random orders: what any map is to be compared with.

    Orders depend on a seed and the image's place in the data alone. Curves have an order for each
    of ``SEEDS`` in the place of the two of a map.

    Args:
        steps: as for :class:`RemovalCurves`.
        perturbation: as for :class:`RemovalCurves`.
        kwargs: further arguments of ``torchmetrics.Metric``.
    """

    SEEDS = range(5)

    def update(  # type: ignore[override]
        self, model: nn.Module, images: Tensor, indices: Sequence[int], target: Tensor
    ) -> None:
        """Take in a batch: images B×3×H×W, their places in the data, and targets B."""
        vit = adapt(model)
        h, w = vit.grid((images.shape[2], images.shape[3]))
        orders = [
            [np.random.Generator(np.random.Philox(key=[s, i])).permutation(h * w) for i in indices]
            for s in self.SEEDS
        ]
        drawn = torch.from_numpy(np.array(orders))
        self._add(curves_in_orders(vit, images, drawn, target, self.steps, self.perturbation))

    def images(self) -> dict[str, Tensor]:
        """For each image the area under the mean of its curves, for each measure."""
        mean = self.curves().values.double().mean(1)
        areas = area(self.removed, mean.transpose(1, 2), int(self.removed[-1]), "trapezoid")
        return dict(zip(MEASURES, areas.unbind(-1), strict=True))

    def compute(self) -> dict[str, Tensor]:
        """The mean over images of each area."""
        return {measure: values.mean() for measure, values in self.images().items()}


def _areas(curves: Tensor, removed: Tensor) -> dict[str, Tensor]:
    """Trapezoid areas under …×2×S×3 values and their gap, by name."""
    result: dict[str, Tensor] = {}
    for index, measure in enumerate(MEASURES):
        sides = area(removed, curves[..., index], int(removed[-1]), "trapezoid").unbind(-1)
        result |= {f"{measure}/{s}": value for s, value in zip(SIDES, sides, strict=True)}
        result[f"{measure}/gap"] = sides[0] - sides[1]
    return result
