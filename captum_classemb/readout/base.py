"""What a readout is: a map from the tokens of a hidden state to class logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError

__all__ = ["HeldReadout", "Readout"]


class HeldReadout(Protocol):
    """A readout with every σ held at its value: logits = Σ_q u_q·x_q + offset."""

    def pull(self, logit_weights: Tensor) -> Tensor:
        """U = Σ_c g_c u_c for the weights g (B×C): B×Q×D."""
        ...

    def offset(self, logit_weights: Tensor) -> Tensor:
        """The part of Σ_c g_c·logit_c that comes from biases alone: B."""
        ...

    def pooled_mlp(self, logit_weights: Tensor) -> Tensor | None:
        """The part that an MLP of the pool adds, B; None where there is none."""
        ...


class Readout(nn.Module, ABC):
    """A map from hidden states to class logits, whole images or single tokens.

    Attributes:
        num_classes: C.
        reads: the tokens that the logits of an image are read from, as a slice of all N.
    """

    num_classes: int
    reads: slice

    #: True if features are mapped to logits by one matrix, which gives all classes at once.
    linear_head: bool = False

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """Pool and read: logits (B×C) from the rows that are read (B×Q×D)."""

    @abstractmethod
    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        """Read every token as if it were the only one pooled.

        Args:
            tokens: hidden states of all N tokens, B×N×D.
            target: class indices B, if only one class an image is wanted.

        Returns:
            logits B×N×C, or B×N with a target.
        """

    def pull(self, rows: Tensor, logit_gradient: Tensor) -> Tensor:
        """∂(g·logits)/∂rows: B×Q×D, by autograd through the readout alone unless overridden."""
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad((self(leaf) * logit_gradient).sum(), leaf)
        return gradient

    def pull_each(self, rows: Tensor, classes: Tensor) -> Tensor:
        """∂logit_c/∂rows for each of K classes: B×K×Q×D."""
        count = len(classes)
        repeated = rows.repeat_interleave(count, 0)
        one_hot = torch.zeros(count, self.num_classes, dtype=rows.dtype, device=rows.device)
        one_hot.scatter_(1, classes[:, None], 1.0)
        pulled = self.pull(repeated, one_hot.repeat(len(rows), 1))
        return pulled.view(len(rows), count, *rows.shape[1:])

    def hold(self, rows: Tensor) -> HeldReadout:
        """The affine map that remains when every σ keeps the value it has at ``rows``.

        Raises:
            UnsupportedModelError: if the readout is not affine then.
        """
        raise UnsupportedModelError(
            f"the readout {type(self).__name__} is not affine with its norms held, "
            "so there is no exact ledger of its logits."
        )

    def token_directions(self, tokens: Tensor, target: Tensor) -> Tensor:
        """U of every token read alone, with every σ held at ``tokens``: B×N×D.

        Raises:
            UnsupportedModelError: if the readout is not affine then.
        """
        raise UnsupportedModelError(
            f"the readout {type(self).__name__} is not affine with its norms held, "
            "so memories have no exact share of its logits."
        )

    def at(self, block: int, site: str) -> Readout:
        """The readout to use for one block and site: itself, unless it has one for each."""
        return self
