"""Read many tokens into class space without holding tokens × classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classemb.errors import NonFiniteError
from captum_classemb.readout import ClassEmbedding, Norm, Readout


class TokenScores(NamedTuple):
    """What is kept of the logits of each token.

    Attributes:
        rank: number of other classes whose logit is at least the target's, int32, B×N.
        target_logit: B×N.
        top: the classes with the highest logits, best first, int64, B×N×K.
        matches: whether the reference class has the highest logit, bool, B×N; no elements
            without a reference.
    """

    rank: Tensor
    target_logit: Tensor
    top: Tensor
    matches: Tensor


class TokenReader:
    """Reads the tokens of many sites with one readout, in memory that is taken once.

    The readout's weights are copied: a reader does not see later changes.

    Args:
        readout: from tokens to logits.
    """

    def __init__(self, readout: Readout) -> None:
        self.readout = readout
        self.matrix: Tensor | None = None
        self.bias: Tensor | None = None
        self.norms: list[Norm] = []
        if isinstance(readout, ClassEmbedding) and len(readout.parts) == 1:
            head = readout.parts[0].head
            self.matrix, self.bias = head.weight.T.contiguous(), head.offset()
            both = (readout.token_norm, readout.pooled_norm)
            self.norms = [norm for norm in both if norm is not None]
        self._buffer = torch.empty(0)

    def _logits_buffer(self, rows: int, like: Tensor) -> Tensor:
        """The same memory for every chunk of every site: it stays in the cache."""
        shape, last = (rows, self.readout.num_classes), self._buffer
        if last.shape != shape or last.dtype != like.dtype or last.device != like.device:
            self._buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        return self._buffer

    def scores(
        self, tokens: Tensor, target: Tensor, top: int = 1, reference: Tensor | None = None
    ) -> TokenScores:
        """Rank and logit of the target, and the best classes, of every token.

        Args:
            tokens: hidden states, B×N×D.
            target: class indices, B.
            top: K, how many of the best classes are kept; to find them costs more than the ranks.
            reference: one class for each token, B×N, which is compared with the best one.

        Raises:
            NonFiniteError: if a target's logit is NaN or infinite.
        """
        shape = tokens.shape[:2]
        own = target[:, None].expand(shape).flatten()
        other = own if reference is None else reference.flatten()
        kind = torch.promote_types(tokens.dtype, torch.float32)
        device = tokens.device
        rank, logit, best, beside = torch.empty(4, len(own), dtype=kind, device=device)
        classes = torch.empty(len(own), top, dtype=torch.int64, device=device)
        for rows, logits in self._chunks(tokens):
            torch.gather(logits, -1, own[rows, None], out=logit[rows, None])
            if top == 1:
                # max is several times faster than argmax on a CPU, and amax than max.
                classes[rows, 0] = logits.max(-1).indices
            elif top:
                classes[rows] = logits.topk(top, dim=-1).indices
            if reference is not None:
                torch.amax(logits, -1, out=best[rows])
                torch.gather(logits, -1, other[rows, None], out=beside[rows, None])
            # In the logits' place, which are needed no more, and in floating point, which counts
            # exactly up to 2^24 classes: a second buffer would drive the first from the cache.
            torch.ge(logits, logit[rows, None], out=logits)
            torch.sum(logits, -1, out=rank[rows])
        if not torch.isfinite(logit).all():
            raise NonFiniteError("a token's logit is NaN or infinite: a rank needs finite numbers.")
        matches = torch.empty(0, dtype=torch.bool)
        return TokenScores(
            (rank - 1).to(torch.int32).unflatten(0, shape),
            logit.unflatten(0, shape),
            classes.unflatten(0, shape),
            matches if reference is None else (beside == best).unflatten(0, shape),
        )

    def _chunks(self, tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits of some tokens after others, rows×C; they may be written over."""
        size = chunk_rows(self.readout.num_classes, tokens.device)
        if self.matrix is None:
            # Such a readout reads tokens by their place, so images stay whole.
            per_image = tokens.shape[1]
            images = max(1, size // per_image)
            for start in range(0, tokens.shape[0], images):
                logits = self.readout.project(tokens[start : start + images]).flatten(0, 1)
                rows = slice(start * per_image, start * per_image + len(logits))
                yield rows, logits
            return
        flat = tokens.flatten(0, 1)
        kind = torch.promote_types(tokens.dtype, torch.float32)
        matrix = self.matrix.to(tokens.device, kind)
        bias = None if self.bias is None else self.bias.to(tokens.device, kind)
        # Chunks of the same size, so that none is left with a few rows.
        size = -(-len(flat) // -(-len(flat) // size))
        buffer = self._logits_buffer(size, matrix)
        for start in range(0, len(flat), size):
            features = flat[start : start + size].to(kind)
            for norm in self.norms:
                features = _normalise(norm, features)
            logits = torch.mm(features, matrix, out=buffer[: len(features)])
            if bias is not None:
                logits.add_(bias)
            yield slice(start, start + len(features)), logits


def target_logits(readout: Readout, tokens: Tensor, target: Tensor) -> Tensor:
    """The logit of one class an image, for every token: B×N, without the other classes'.

    Args:
        readout: from tokens to logits.
        tokens: hidden states, B×N×D.
        target: class indices, B.
    """
    if not isinstance(readout, ClassEmbedding) or len(readout.parts) > 1:
        return readout.project(tokens, target)
    features = tokens if tokens.dtype == torch.float64 else tokens.float()
    for norm in (readout.token_norm, readout.pooled_norm):
        features = features if norm is None else _normalise(norm, features)
    head = readout.parts[0].head
    logits = torch.bmm(features, head.weight[target].to(features.dtype)[..., None])[..., 0]
    bias = head.offset()
    return logits if bias is None else logits + bias[target].to(logits.dtype)[:, None]


def chunk_rows(num_classes: int, device: torch.device) -> int:
    """How many tokens' logits are held at once: what a cache holds, or what fills a GPU."""
    size = 1 << 22 if device.type == "cpu" else 1 << 28
    rows = size // (4 * num_classes)
    # Products of a few rows are slow; and matrix products like whole tiles.
    return max(256, rows - rows % 32)


def _normalise(norm: Norm, tokens: Tensor) -> Tensor:
    """The norm in one pass over memory where torch has it."""
    if norm.kind != "layer" or norm.groups != 1 or norm.eps is None:
        return norm(tokens)
    weight, bias = (
        None if parameter is None else parameter.detach().to(tokens.dtype)
        for parameter in (getattr(norm.module, "weight", None), getattr(norm.module, "bias", None))
    )
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, norm.eps)
