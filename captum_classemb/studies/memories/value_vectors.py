"""Which classes the value vectors of memories stand for (Vilas et al. §5.1–5.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_classemb.errors import InputError
from captum_classemb.functional.variant import Variant, check_variant

#: Logits held at once while all value vectors are read.
_CHUNK = 1 << 24


class ValueClasses(NamedTuple):
    """The classes that the value vectors of one layer stand for.

    Attributes:
        agreement: the highest cosine that each class embedding has with a value vector, C.
        best_classes: the K classes with the highest logit in each value vector, M×K.
        best_memories: the K value vectors that give each class its highest logits, C×K.
    """

    agreement: Tensor
    best_classes: Tensor
    best_memories: Tensor


def value_classes(class_embedding: Tensor, values: Tensor, k: int = 5) -> ValueClasses:
    """Project all value vectors in chunks, so that C×M logits are never in memory at once.

    The best ones go by the logit E·v, the agreement by the cosine.

    Args:
        class_embedding: E, C×D.
        values: value vectors as rows, M×D.
        k: how many of the best are kept.

    Raises:
        InputError: if there are fewer than ``k`` classes or value vectors.
    """
    classes, memories = class_embedding.shape[0], values.shape[0]
    if k > min(classes, memories):
        raise InputError(f"the best {k} of {classes} classes and {memories} memories do not exist.")
    norms = class_embedding.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    agreement = class_embedding.new_full((classes,), -1.0)
    best_classes = []
    top = class_embedding.new_empty(classes, 0)
    place = torch.empty(classes, 0, dtype=torch.int64, device=values.device)
    size = max(k, _CHUNK // classes)
    for start in range(0, memories, size):
        part = values[start : start + size]
        logits = class_embedding @ part.T
        best_classes.append(logits.topk(k, dim=0).indices.T)
        cosine = logits / norms / part.norm(dim=-1).clamp_min(1e-12)
        agreement = torch.maximum(agreement, cosine.amax(1))
        here = torch.arange(start, start + part.shape[0], device=values.device)
        both = torch.cat([top, logits], dim=1)
        places = torch.cat([place, here.expand(classes, -1)], dim=1)
        top, order = both.topk(min(k, both.shape[1]), dim=1)
        place = places.gather(1, order)
    return ValueClasses(agreement, torch.cat(best_classes), place)


def keys_agree(
    strongest: Tensor, value: ValueClasses, target: Tensor, variant: Variant = "corrected"
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
        wanted = value.best_memories[target][:, None, None]
        return (strongest[..., None] == wanted).flatten(2).any(-1)
    # The table of memories that stand for each image's target is B×M; tokens only look it up.
    stands = (value.best_classes[None] == target[:, None, None]).any(-1)
    return stands.gather(1, strongest.flatten(1)).reshape(strongest.shape).any(-1)


def compositional(strongest: Tensor, value: ValueClasses, top_class: Tensor) -> Tensor:
    """Which of a token's strongest memories have the layer's own prediction as their top class.

    Args:
        strongest: the memories with the highest coefficients, B×N×K.
        value: of the layer.
        top_class: the top class of what the layer adds, B×N.

    Returns:
        bool, B×N×K; a layer is compositional where few are True.
    """
    return value.best_classes[:, 0][strongest] == top_class[..., None]
