"""The logit ledger: every entry that adds up to a class's logit, with σ held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LogitLedger"]


@dataclass(frozen=True)
class LogitLedger:
    """The exact split of a logit, or of a log-probability, into what each part adds.

    Attributes:
        attention: by block, head and source token, prefix tokens first: B×L×H×N.
        mlp: by block, B×L.
        embedding: what the tokens read carried before the first block, B.
        bias: every bias on the path, computed from the biases, B.
        pool: what the MLP of an attention pool adds, B; else None.
        entropy: −H(p) where a log-probability is explained, B; else None.
        score: the model's own logit or log-probability, B.
        prefix_tokens: P.
        attention_memories: by block and coefficient of W_O, B×L×M, on request.
        mlp_memories: by block and coefficient of fc2, B×L×M, on request.
    """

    attention: Tensor
    mlp: Tensor
    embedding: Tensor
    bias: Tensor
    score: Tensor
    prefix_tokens: int
    pool: Tensor | None = None
    entropy: Tensor | None = None
    attention_memories: Tensor | None = None
    mlp_memories: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """The direct importance of each patch: attention entries over blocks and heads, B×(N−P)."""
        return self.attention[..., self.prefix_tokens :].sum((1, 2))

    @property
    def rest(self) -> Tensor:
        """All that patches do not bring: prefix tokens, MLPs, embedding and biases, B."""
        prefix = self.attention[..., : self.prefix_tokens].sum((1, 2, 3))
        rest = prefix + self.mlp.sum(1) + self.embedding + self.bias
        return rest + sum(part for part in (self.pool, self.entropy) if part is not None)

    @property
    def total(self) -> Tensor:
        """The sum of all entries, B."""
        return self.patches.sum(1) + self.rest

    @property
    def delta(self) -> Tensor:
        """The sum of all entries minus the model's own score: 0 up to rounding, B."""
        return self.total - self.score

    @property
    def magnitude(self) -> Tensor:
        """Σ|entries|, the scale that rounding is measured against, B."""
        parts = [self.attention.flatten(1), self.mlp, self.embedding[:, None], self.bias[:, None]]
        parts += [part[:, None] for part in (self.pool, self.entropy) if part is not None]
        return torch.cat([part.abs() for part in parts], 1).sum(1)


@dataclass(frozen=True)
class PathLedger:
    """The split of a score by what enters each block, all later blocks being linear.

    At every block the entries of all tokens and the biases from there on add up to the score.

    Attributes:
        entries: by block and token, prefix tokens first: B×L×N.
        bias: every bias from the block on, the readout's included: B×L.
        score: the model's own logit or log-probability, B; B×L where blocks were scaled.
        prefix_tokens: P.
        entropy: −H(p) where a log-probability is explained, of the shape of ``score``; else None.
    """

    entries: Tensor
    bias: Tensor
    score: Tensor
    prefix_tokens: int
    entropy: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """The importance of each patch: the mean of its entries over blocks, B×(N−P)."""
        return self.entries[..., self.prefix_tokens :].mean(1)

    @property
    def rest(self) -> Tensor:
        """All that patches do not bring: prefix tokens and biases, B."""
        return self.total.mean(1) - self.patches.sum(1)

    @property
    def total(self) -> Tensor:
        """The sum of all entries at each block, B×L."""
        total = self.entries.sum(2) + self.bias
        return total if self.entropy is None else total + _by_block(self.entropy)

    @property
    def delta(self) -> Tensor:
        """The sum at each block minus the model's own score: 0 up to rounding, B×L."""
        return self.total - _by_block(self.score)


def _by_block(scores: Tensor) -> Tensor:
    """B or B×L so that it meets B×L."""
    return scores if scores.dim() == 2 else scores[:, None]
