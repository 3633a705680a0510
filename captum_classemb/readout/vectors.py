"""Read any vectors of the residual stream in class space (Vilas et al. §5.1–5.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout.base import Readout
from captum_classemb.readout.class_embedding import ClassEmbedding
from captum_classemb.readout.text import TextEmbedding

__all__ = ["VectorClasses", "read_vectors"]

#: Logits held at once.
_CHUNK = 1 << 24


class VectorClasses(NamedTuple):
    """What vectors stand for.

    Attributes:
        classes: the K classes with the highest logit E·v in each vector, M×K.
        logits: these logits, M×K.
        vectors: the K vectors that give each class its highest logits, C×K (C×M if M < K).
        agreement: the highest cosine that each class embedding has with a vector, C.
    """

    classes: Tensor
    logits: Tensor
    vectors: Tensor
    agreement: Tensor


def read_vectors(vectors: Tensor, readout: Readout | Tensor, k: int = 5) -> VectorClasses:
    """The classes that directions of the residual stream stand for, by their logits E·v.

    The vectors may be value vectors of memories, directions of probes, rows of a sparse
    autoencoder's decoder, or any other directions. They are read without norm and bias, which
    depend on a whole hidden state. No more than some of the M×C logits are in memory at once.

    Args:
        vectors: as rows, M×D.
        readout: a class embedding, of a model or of text; or class directions E, C×D.
        k: how many of the best are kept.

    Raises:
        InputError: if the shapes do not fit, or there are fewer than ``k`` classes.
        UnsupportedModelError: if the readout has no single direction for each class.

    Examples:
        The features of a sparse autoencoder with 256 rows in its decoder:

        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> decoder = torch.randn(256, 96)
        >>> found = read_vectors(decoder, adapt(demo_vit()).readout, k=3)
        >>> found.classes.shape, found.vectors.shape, found.agreement.shape
        (torch.Size([256, 3]), torch.Size([10, 3]), torch.Size([10]))
    """
    embedding = readout if isinstance(readout, Tensor) else _class_directions(readout)
    if vectors.dim() != 2 or vectors.shape[1] != embedding.shape[-1]:
        raise InputError(
            f"vectors have shape {tuple(vectors.shape)}: rows of width {embedding.shape[-1]} are "
            "needed, as wide as the class embeddings."
        )
    count, number = len(embedding), len(vectors)
    if not 1 <= k <= count or not number:
        raise InputError(f"the best {k} of {count} classes and {number} vectors do not exist.")
    vectors = vectors.to(embedding)
    norms = embedding.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    agreement = embedding.new_full((count,), -1.0)
    best, highest = [], []
    top = embedding.new_empty(count, 0)
    place = torch.empty(count, 0, dtype=torch.int64, device=vectors.device)
    for start, part in enumerate(vectors.split(size := max(k, _CHUNK // count))):
        logits = embedding @ part.T
        found = logits.topk(k, dim=0)
        best.append(found.indices.T)
        highest.append(found.values.T)
        cosine = logits / norms / part.norm(dim=-1).clamp_min(1e-12)
        agreement = torch.maximum(agreement, cosine.amax(1))
        here = start * size + torch.arange(len(part), device=vectors.device)
        both = torch.cat([top, logits], dim=1)
        places = torch.cat([place, here.expand(count, -1)], dim=1)
        top, order = both.topk(min(k, both.shape[1]), dim=1)
        place = places.gather(1, order)
    return VectorClasses(torch.cat(best), torch.cat(highest), place, agreement)


def _class_directions(readout: Readout) -> Tensor:
    """E, C×D: the classifier's weight, averaged over heads where there are several.

    Of text embeddings, each carried back through the linear map to image embeddings.
    """
    if isinstance(readout, TextEmbedding):
        image = _class_directions(readout.image)
        return readout.text.to(image) @ image
    if not isinstance(readout, ClassEmbedding):
        raise UnsupportedModelError(
            f"a {type(readout).__name__} is no single matrix, so its classes have no directions of "
            "their own that vectors could be compared with: give such directions, C×D, instead."
        )
    weights = [part.head.weight * part.share for part in readout.parts]
    return torch.stack(weights).sum(0)
