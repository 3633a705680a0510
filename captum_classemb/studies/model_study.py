"""What studies of one model over one dataset have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from captum_classemb.data import patch_mask
from captum_classemb.data.patches import PatchRule
from captum_classemb.errors import InputError
from captum_classemb.functional.variant import Variant, check_variant
from captum_classemb.readout import Readout
from captum_classemb.runs.batches import Batch
from captum_classemb.runs.config import StudyConfig
from captum_classemb.runs.study import Study
from captum_classemb.runs.tables import Row
from captum_classemb.studies.class_and_context import ClassContextDifference, ShuffledTokens
from captum_classemb.studies.class_identifiability import Identifiability
from captum_classemb.studies.group_means import Means
from captum_classemb.studies.token_groups import GROUPS, membership
from captum_classemb.studies.token_reader import TokenReader
from captum_classemb.vit import ViT, adapt

#: (block, site) of each row of a metric.
Places = Sequence[tuple[int, str]]


class ModelStudy(Study):
    """A study of one model: adapts it, groups its tokens, and makes its rows.

    Args:
        config: the model and how it is studied.

    Raises:
        UnsupportedModelError: if the library cannot read the model.
        InputError: for an unknown variant, or a readout that is none.
    """

    compares = True

    def __init__(self, config: StudyConfig) -> None:
        check_variant(config.variant)
        self.config = config
        self.vit: ViT = adapt(config.model)
        readout = config.readout or self.vit.readout
        if not isinstance(readout, Readout):
            raise InputError(f"a {type(readout).__name__} is no readout to study with.")
        self.readout = readout
        self.variant: Variant = config.variant
        self._readers: dict[int, TokenReader] = {}

    def settings(self) -> dict[str, Any]:
        return {**self.config.settings(), "readout": type(self.readout).__name__}

    def reader(self, block: int, site: str) -> TokenReader:
        """Reads the tokens of a site; one for all sites that share a readout."""
        readout = self.readout.at(block, site)
        if id(readout) not in self._readers:
            self._readers[id(readout)] = TokenReader(readout)
        return self._readers[id(readout)]

    @property
    def patch_rule(self) -> PatchRule:
        """The published code takes the top-left pixel of a patch for the whole patch."""
        return "nearest" if self.variant == "paper" else "majority"

    def members(self, batch: Batch, tokens: int) -> Tensor:
        """Which tokens are CLS, image, class and context tokens: bool, 4×B×N."""
        patches = None
        if batch.masks is not None:
            height, width = batch.images.shape[-2:]
            patches = patch_mask(batch.masks, self.vit.grid((height, width)), self.patch_rule)
        return membership(
            len(batch.indices), tokens, self.vit.prefix_tokens, patches, batch.images.device
        )

    def row(
        self, metric: str, value: Tensor | float, n: Tensor | int, place: tuple[int, str],
        tokens: str = "", group: str = "all",
    ) -> Row:  # fmt: skip
        """One row of a table."""
        block, site = place
        return Row(
            self.name, self.config.name, block, site, tokens, group, self.variant, metric,
            float(value), int(n),
        )  # fmt: skip

    def group_rows(self, metric: str, means: Means, places: Places) -> Iterator[Row]:
        """A row for each place and each group that has tokens."""
        for place, values in zip(places, means.value, strict=True):
            for (tokens, group), value, n in zip(GROUPS, values, means.n, strict=True):
                if n > 0:
                    yield self.row(metric, value, n, place, tokens, group)

    def identifiability_rows(
        self, found: Identifiability, places: Places, head: str = ""
    ) -> Iterator[Row]:
        """Mean, rate and share of images; the names of the metrics begin with ``head``."""
        for metric, value, n in (
            ("class_identifiability", found.mean, found.tokens),
            ("class_identifiability_rate", found.rate, found.tokens),
            ("images_with_identifiable_token", found.images, found.images_counted),
        ):
            yield from self.group_rows(f"{head}{metric}", Means(value, n), places)

    def class_context(
        self, rows: int, levels: int = 2, scale: float = 1.0, shift: float = 0.0
    ) -> ClassContextDifference | ShuffledTokens:
        """Compares class and context tokens in whole numbers below ``levels``.

        The image is the unit, or, as published, the token; ``shift + scale · level`` is compared.
        """
        if self.variant == "paper":
            return ShuffledTokens(rows, levels, scale, shift, self.config.seed)
        return ClassContextDifference(rows, scale=scale, shift=shift, seed=self.config.seed)

    def difference_rows(
        self, metric: str, difference: ClassContextDifference | ShuffledTokens, places: Places
    ) -> Iterator[Row]:
        """Class − context and its p-value; and, where images are the unit, both means."""
        found = difference.compute()
        if found.n == 0 or found.value.isnan().all():
            return
        for index, place in enumerate(places):
            if self.variant == "corrected":
                for group, mean in zip(("class", "context"), found.means[:, index], strict=True):
                    yield self.row(f"{metric}_by_image", mean, found.n, place, "image", group)
            for name, value in (("", found.value[index]), ("_p", found.p[index])):
                yield self.row(
                    f"{metric}_class_minus_context{name}", value, found.n, place, "image",
                    "class - context",
                )  # fmt: skip
