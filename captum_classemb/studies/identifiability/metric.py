"""Class similarity change rate and residual composition (Vilas et al. §4.2, §5)."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.functional.variant import Variant, check_variant
from captum_classemb.studies.group_means import GroupedMean

#: Where the top class of a block's output may come from.
SOURCES = ("previous", "attention", "mlp", "none")


def similarity_increases(after: Tensor, before: Tensor) -> Tensor:
    """Whether the target's logit is higher at the output of a layer than at its input.

    Args:
        after: the target's logits at the output, any shape.
        before: at the input, of the same shape.

    Returns:
        bool; its mean over tokens is the class similarity change rate.
    """
    return after > before


def residual_matches(matches: Tensor, variant: Variant = "corrected") -> Tensor:
    """Where the top class of a block's output comes from.

    To the matches with its sources is added that none of them has it ("composition"). The
    published code (``"paper"``) compares with attention twice there and never with the MLP, so
    tokens that match the MLP alone are counted twice.

    Args:
        matches: whether the block before, attention and the MLP have the same top class as the
            output, bool, 3×….
        variant: ``"corrected"`` or ``"paper"``.

    Returns:
        bool, 4×…: in the order of :data:`SOURCES`.

    Raises:
        InputError: for an unknown variant.

    Examples:
        >>> mlp_alone = torch.tensor([False, False, True])
        >>> residual_matches(mlp_alone).tolist(), residual_matches(mlp_alone, "paper").tolist()
        ([False, False, True, False], [False, False, True, True])
    """
    check_variant(variant)
    compared = matches if variant == "corrected" else matches[:2]
    return torch.cat([matches, ~compared.any(0, keepdim=True)])


class ClassSimilarityChangeRate(GroupedMean):
    """Share of tokens whose correct-class logit is higher at a layer's output than at its input.

    Args:
        rows: R layers.

    Examples:
        >>> import torch
        >>> from captum_classemb.studies.token_groups import membership
        >>> metric = ClassSimilarityChangeRate(rows=1)
        >>> before, after = torch.zeros(1, 1, 3), torch.tensor([[[1.0, -1.0, 2.0]]])
        >>> metric.update(after, before, membership(1, 3, prefix_tokens=1))
        >>> metric.compute().value[0, 1].item()
        0.5
    """

    def update(self, after: Tensor, before: Tensor, members: Tensor) -> None:  # type: ignore[override]
        """Take in a batch.

        Args:
            after: the correct class's logits at the output of each layer, R×B×N.
            before: at its input, R×B×N.
            members: 4×B×N, of :func:`~captum_classemb.studies.token_groups.membership`.
        """
        super().update(similarity_increases(after, before), members)


class ResidualComposition(GroupedMean):
    """Share of tokens whose top class at a block's output is that of each of its sources.

    The rows of the result are blocks × :data:`SOURCES`: the block before, attention, the MLP,
    none of them. In the ``"paper"`` variant the last compares with attention twice and never with
    the MLP.

    Args:
        blocks: L.
        variant: ``"corrected"`` or ``"paper"``.
    """

    def __init__(self, blocks: int, variant: Variant = "corrected") -> None:
        super().__init__(blocks * len(SOURCES))
        self.variant = variant

    def update(self, matches: Tensor, members: Tensor) -> None:
        """Take in a batch.

        Args:
            matches: whether the block before, attention and the MLP have the same top class as
                the output of each block, bool, 3×L×B×N.
            members: 4×B×N, of :func:`~captum_classemb.studies.token_groups.membership`.
        """
        found = residual_matches(matches, self.variant)
        super().update(found.transpose(0, 1).flatten(0, 1), members)
