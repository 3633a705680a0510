"""The tuned lens: hidden states are translated to the last block's before they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from captum_classemb.functional.precision import upcast
from captum_classemb.readout.base import Readout
from captum_classemb.readout.output_path import along
from captum_classemb.readout.placed import Place, PlacedReadout

__all__ = ["Translated", "Translator", "TunedLens"]


class Translator:
    """The affine map x + Ax + b of every token.

    Args:
        matrix: A, D×D.
        bias: b, D.
    """

    def __init__(self, matrix: Tensor, bias: Tensor) -> None:
        self.matrix = matrix
        self.bias = bias

    @classmethod
    def identity(cls, width: int, device: torch.device | None = None) -> Translator:
        """The translator that changes nothing."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def __call__(self, x: Tensor) -> Tensor:
        x = upcast(x)
        return x + x @ self.matrix.to(x).T + self.bias.to(x)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """The cotangent of the input."""
        return cotangent + cotangent @ self.matrix.to(cotangent)


class Translated(Readout):
    """A readout of translated tokens.

    Args:
        own: reads what the translator returns.
        translator: the affine map of each token.
    """

    def __init__(self, own: Readout, translator: Translator) -> None:
        super().__init__()
        # In a tuple, so that the modules of the model are not registered a second time.
        self._own = (own,)
        self.translator = translator
        self.num_classes = own.num_classes
        self.reads = own.reads

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._own[0](self.translator(rows))
        return logits

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        return self._own[0].project(self.translator(tokens), target)

    def vjp(self, rows: Tensor, g: Tensor, frozen: bool = False, summed: bool = False) -> Tensor:
        return self.translator.vjp(self._own[0].vjp(self.translator(rows), g, frozen, summed))

    def constants(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        own, translated = self._own[0], self.translator(rows)
        bias, pool = own.constants(translated, g)
        u = own.vjp(translated, g, frozen=True)
        return bias + along(self.translator.bias, u), pool

    def linearised(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        u, constant = self._own[0].linearised(self.translator(rows), g)
        return self.translator.vjp(u), constant + along(self.translator.bias, u)

    def token_directions(self, tokens: Tensor, target: Tensor) -> Tensor:
        directions = self._own[0].token_directions(self.translator(tokens), target)
        return self.translator.vjp(directions)


class TunedLens(PlacedReadout):
    """The class embedding behind an affine translator for each place (Belrose et al. 2023).

    A translator is fitted so that what the class embedding reads of a translated token is what it
    reads of the same token after the last block. Unlike a probe it never sees a label. After the
    last block nothing is left to translate.

    Args:
        own: the model's readout.
        translators: of each (block, site).

    Raises:
        InputError: if there is no place.

    Examples:
        >>> from captum_classemb import ClassEmbeddingProjection
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> vit = adapt(demo_vit())
        >>> lens = TunedLens(vit.readout, {(2, "resid_post"): Translator.identity(96)})
        >>> projection = ClassEmbeddingProjection(vit, readout=lens, block=2)
        >>> projection.attribute_patches(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(self, own: Readout, translators: Mapping[Place, Translator]) -> None:
        super().__init__({place: Translated(own, t) for place, t in translators.items()})
        self.translators = dict(translators)
        self._own = (own,)

    @property
    def last(self) -> Readout:
        """The model's own readout."""
        return self._own[0]
