"""What a readout is: a map from the tokens of a hidden state to class logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast

__all__ = ["Readout"]


class Readout(nn.Module, ABC):
    """A map from hidden states to class logits, whole images or single tokens.

    Attributes:
        num_classes: C.
        reads: the tokens that the logits of an image are read from, as a slice of all N.
    """

    num_classes: int
    reads: slice

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """Pool and read: logits (…×C) from the rows that are read (…×Q×D)."""

    @abstractmethod
    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        """Read every token as if it were the only one pooled.

        Args:
            tokens: hidden states of all N tokens, B×N×D.
            target: class indices B, if only one class an image is wanted.

        Returns:
            logits B×N×C, or B×N with a target.
        """

    def vjp(self, rows: Tensor, g: Tensor, frozen: bool = False, summed: bool = False) -> Tensor:
        """∂(g·logits)/∂rows for K weightings g of the logits.

        By autograd through the readout alone, unless overridden.

        Args:
            rows: …×Q×D.
            g: …×K×C.
            frozen: with every σ a constant: the readout is then affine in the rows.
            summed: over the rows, which leaves one.

        Returns:
            …×Q×K×D.

        Raises:
            UnsupportedModelError: if ``frozen``, and the readout is not affine then.
        """
        if frozen:
            raise self._not_affine()
        count = g.shape[-2]
        with torch.enable_grad():
            leaf = rows.detach()[..., None, :, :].repeat(*(1,) * (rows.dim() - 2), count, 1, 1)
            leaf = leaf.flatten(0, -3).requires_grad_(True)
            logits = self(leaf)
            (gradient,) = torch.autograd.grad((logits * g.reshape(logits.shape)).sum(), leaf)
        each = upcast(gradient).view(*rows.shape[:-2], count, *rows.shape[-2:]).transpose(-3, -2)
        return each.sum(-3, keepdim=True) if summed else each

    def constants(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """What Σ_c g_c·logit_c holds beside Σ_q direction_q·x_q, with every σ frozen.

        Args:
            rows: B×Q×D.
            g: B×K×C.

        Returns:
            the part that comes from biases alone (B×K), and the part that an MLP of the pool adds
            (B×K; None where there is none).

        Raises:
            UnsupportedModelError: if the readout is not affine with its norms frozen.
        """
        raise self._not_affine()

    def linearised(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Directions of the rows and the constant that make up Σ_c g_c·logit_c, every σ frozen.

        An MLP of the pool is followed with its activation's gate frozen, where :meth:`constants`
        holds what it adds.

        Args:
            rows: B×Q×D.
            g: B×K×C.

        Returns:
            B×Q×K×D and B×K.

        Raises:
            UnsupportedModelError: if the readout is not affine with its norms frozen.
        """
        constant, pool = self.constants(rows, g)
        return self.vjp(rows, g, frozen=True), constant if pool is None else constant + pool

    def _not_affine(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the readout {type(self).__name__} is not affine with its norms frozen, "
            "so there is no exact ledger of its logits."
        )

    def token_directions(self, tokens: Tensor, target: Tensor) -> Tensor:
        """The direction of every token read alone, with every σ frozen at ``tokens``: B×N×D.

        Raises:
            UnsupportedModelError: if the readout is not affine then.
        """
        raise UnsupportedModelError(
            f"the readout {type(self).__name__} is not affine with its norms frozen, "
            "so memories have no exact share of its logits."
        )

    def at(self, block: int, site: str) -> Readout:
        """The readout to use for one block and site: itself, unless it has one for each."""
        return self
