"""Sufficient statistics of ridge probes, whose size does not depend on the number of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classemb.functional.ridge import packed_gram, packed_size, ridge, unpack_gram
from captum_classemb.readout import ProbeHeads
from captum_classemb.readout.placed import Place
from captum_classemb.studies.group_means import SumMetric

#: What readouts are fitted to unless other sites are named.
FITTED_SITES = ("resid_post", "attn_out", "mlp_out")
#: Bytes of sums that are held at once unless something else is asked for.
MEMORY_LIMIT = 1_000_000_000


@dataclass(frozen=True)
class ProbePlan:
    """Which probes are fitted together.

    Attributes:
        passes: the (block, site) pairs of each pass, with the tokens of its probes.
        bytes_held: the most that the sums of a pass take.
    """

    passes: list[list[tuple[Place, slice]]]
    bytes_held: int

    def __str__(self) -> str:
        count = sum(len(part) for part in self.passes)
        times = "1 pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        size = f"{self.bytes_held / 1e6:,.0f} MB"
        return f"{count} probes in {times} over the images, whose sums take {size}"


def plan_probes(
    places: Sequence[Place],
    tokens: Sequence[slice],
    width: int,
    classes: int,
    folds: int = 1,
    memory_limit: int = MEMORY_LIMIT,
) -> ProbePlan:
    """Split probes into as few passes as memory allows.

    Args:
        places: (block, site) pairs.
        tokens: the tokens of each probe of a place.
        width: D.
        classes: K.
        folds: parts of the data whose sums are kept apart.
        memory_limit: bytes that the sums of one pass may take; one probe is always fitted.

    Examples:
        >>> places = [(b, s) for b in range(12) for s in ("resid_post", "attn_out", "mlp_out")]
        >>> plan = plan_probes(places, [slice(0, 1), slice(1, None)], width=768, classes=1000)
        >>> print(plan)
        72 probes in 1 pass over the images, whose sums take 641 MB
    """
    each = folds * 8 * (packed_size(width) + classes * width + classes)
    together = max(1, memory_limit // each)
    probes = [(place, which) for place in places for which in tokens]
    count = -(-len(probes) // together)
    # Passes of equal size, so that none is left with a single probe.
    size = -(-len(probes) // count)
    passes = [probes[start : start + size] for start in range(0, len(probes), size)]
    return ProbePlan(passes, size * each)


class ProbeStatistics(SumMetric):
    """Gram matrices, class sums and counts of the features of some tokens, in float64.

    Args:
        probes: how many probes: combinations of a place and some tokens.
        width: D.
        classes: K.
        folds: parts of the data whose sums are kept apart.

    Examples:
        >>> statistics = ProbeStatistics(probes=1, width=2, classes=2)
        >>> features = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])
        >>> statistics.update(0, features, torch.tensor([0, 1]))
        >>> statistics.solve(0, alpha=2.0)[0].tolist()
        [[0.5, 0.0], [-0.5, 0.0]]
    """

    gram: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, probes: int, width: int, classes: int, folds: int = 1) -> None:
        super().__init__()
        self.width = width
        self._shapes = {
            "gram": (probes, folds, packed_size(width)),
            "sums": (probes, folds, classes, width),
            "counts": (probes, folds, classes),
        }
        for name in self._shapes:
            # torchmetrics keeps a copy of what a state starts with: that one stays empty.
            self.add_state(name, torch.zeros(0, dtype=torch.float64), "sum")
        self.reset()

    def reset(self) -> None:
        """Set all sums to zero."""
        super().reset()
        for name, shape in self._shapes.items():
            setattr(self, name, torch.zeros(shape, dtype=torch.float64, device=self.device))

    def release(self) -> None:
        """Free the memory of the sums until the next reset."""
        super().reset()

    def update(self, probe: int, features: Tensor, labels: Tensor, fold: int = 0) -> None:
        """Take in the features of some images.

        Args:
            probe: which one.
            features: B×Q×D, the tokens that this probe reads.
            labels: classes, B.
            fold: the part of the data that the images belong to.
        """
        batch, tokens, _ = features.shape
        self.gram[probe, fold] += packed_gram(features.flatten(0, 1))
        # The tokens of an image have one class, so they are summed first.
        self.sums[probe, fold].index_add_(0, labels, features.double().sum(1))
        counted = torch.full((batch,), float(tokens), dtype=torch.float64, device=labels.device)
        self.counts[probe, fold].index_add_(0, labels, counted)

    def solve(
        self, probe: int, without: int | None = None, alpha: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Weight (K×D) and bias (K) of the ridge regression, float64.

        Args:
            probe: which one.
            without: a fold that is left out.
            alpha: the penalty.
        """
        kept = [fold for fold in range(self.gram.shape[1]) if fold != without]
        gram, sums, counts = (
            state[probe, kept].sum(0) for state in (self.gram, self.sums, self.counts)
        )
        return ridge(unpack_gram(gram, self.width), sums, counts, alpha)

    def compute(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every probe, of all folds."""
        return [self.solve(probe) for probe in range(len(self.gram))]


def stack_probes(
    probes: Sequence[tuple[Place, slice]], solved: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Place, ProbeHeads]]:
    """The classifiers of each place side by side, float32.

    Args:
        probes: place and tokens of each, those of one place in the order of its tokens.
        solved: weight and bias of each.
    """
    for place in dict.fromkeys(place for place, _ in probes):
        own = [pair for (where, _), pair in zip(probes, solved, strict=True) if where == place]
        weights, biases = zip(*own, strict=True)
        yield place, ProbeHeads(torch.stack(weights).float(), torch.stack(biases).float())
