"""Whether the strongest memories of tokens stand for a class (Vilas et al. §5.2–5.3)."""

from __future__ import annotations

from torch import Tensor

from captum_classemb.functional.variant import Variant, check_variant
from captum_classemb.readout.vectors import VectorClasses


def keys_agree(
    strongest: Tensor, value: VectorClasses, target: Tensor, variant: Variant = "corrected"
) -> Tensor:
    """Whether one of a token's strongest memories stands for the target.

    ``"corrected"``: the target is among the best classes of that memory's value vector.
    ``"paper"``: the memory is among the best memories of the target, as in the published code.

    Args:
        strongest: the memories with the highest coefficients, B×N×K.
        value: of the layer.
        target: class indices, B.
        variant: ``"corrected"`` or ``"paper"``.

    Returns:
        bool, B×N.

    Raises:
        InputError: for an unknown variant.
    """
    check_variant(variant)
    if variant == "paper":
        wanted = value.vectors[target][:, None, None]
        return (strongest[..., None] == wanted).flatten(2).any(-1)
    # The table of memories that stand for each image's target is B×M; tokens only look it up.
    stands = (value.classes[None] == target[:, None, None]).any(-1)
    return stands.gather(1, strongest.flatten(1)).reshape(strongest.shape).any(-1)


def compositional(strongest: Tensor, value: VectorClasses, top_class: Tensor) -> Tensor:
    """Which of a token's strongest memories have the layer's own prediction as their top class.

    Args:
        strongest: the memories with the highest coefficients, B×N×K.
        value: of the layer.
        top_class: the top class of what the layer adds, B×N.

    Returns:
        bool, B×N×K; a layer is compositional where few are True.
    """
    return value.classes[:, 0][strongest] == top_class[..., None]
