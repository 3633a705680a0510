"""Text embeddings as class embeddings, for zero-shot classifiers such as CLIP and SigLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_classemb.errors import InputError
from captum_classemb.functional.precision import upcast
from captum_classemb.readout.base import Readout

__all__ = ["TextEmbedding"]


class TextEmbedding(Readout):
    """score_c = scale · cos(image embedding, text embedding of class c) + bias.

    Args:
        image: the readout that gives the image embedding Wx, which is a model's own readout where
            the model ends in its projection.
        text_features: one text embedding for each class, C×F.
        scale: the factor of the cosine (CLIP's exponentiated logit scale).
        bias: added to every score (SigLIP's logit bias).

    Raises:
        InputError: if the text features are no C×F matrix of the image embedding's width.
    """

    text: Tensor

    def __init__(
        self, image: Readout, text_features: Tensor, scale: float = 1.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        width = image.num_classes
        if text_features.dim() != 2 or text_features.shape[1] != width:
            raise InputError(
                f"text features have shape {tuple(text_features.shape)}: "
                f"C×{width} is needed, one row for each class."
            )
        # In a tuple, so that the modules of the model are not registered a second time.
        self._image = (image,)
        unit = torch.nn.functional.normalize(upcast(text_features.detach()), dim=-1)
        self.register_buffer("text", unit * scale)
        self.bias = bias
        self.num_classes = len(text_features)
        self.reads = image.reads

    @property
    def image(self) -> Readout:
        """The readout that gives the image embedding."""
        return self._image[0]

    def scores(self, embedding: Tensor) -> Tensor:
        """Scores of image embeddings, scale · cos + bias: …×F to …×C."""
        unit = torch.nn.functional.normalize(embedding, dim=-1)
        return unit @ self.text.to(unit).T + self.bias

    def forward(self, rows: Tensor) -> Tensor:
        return self.scores(self.image(rows))

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        scores = self.scores(self.image.project(tokens))
        if target is None:
            return scores
        return scores.gather(-1, target[:, None, None].expand(*scores.shape[:2], 1))[..., 0]

    def vjp(self, rows: Tensor, g: Tensor, frozen: bool = False, summed: bool = False) -> Tensor:
        embedding = self.image(rows)
        norm = embedding.norm(dim=-1, keepdim=True)
        c = g @ self.text.to(embedding)
        if not frozen:
            unit = (embedding / norm)[..., None, :]
            c = c - unit * (unit * c).sum(-1, keepdim=True)
        return self.image.vjp(rows, c / norm[..., None], frozen, summed)

    def constants(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        embedding = self.image(rows)
        norm = embedding.norm(dim=-1, keepdim=True)[..., None]
        bias, pool = self.image.constants(rows, g @ self.text.to(embedding) / norm)
        return g.sum(-1) * self.bias + bias, pool

    def linearised(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.image(rows)
        norm = embedding.norm(dim=-1, keepdim=True)[..., None]
        u, constant = self.image.linearised(rows, g @ self.text.to(embedding) / norm)
        return u, constant + g.sum(-1) * self.bias

    def token_directions(self, tokens: Tensor, target: Tensor) -> Tensor:
        raise InputError(
            "memories of single tokens are not defined for text embeddings: the norm of the image "
            "embedding belongs to the pooled tokens."
        )
