"""The class embedding: the model's own classifier, read at any hidden state (Vilas et al. §3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classemb.functional.precision import upcast
from captum_classemb.readout.base import Readout
from captum_classemb.readout.linear import Linear
from captum_classemb.readout.norm import Norm
from captum_classemb.readout.output_path import along
from captum_classemb.readout.text import TextEmbedding

__all__ = ["ClassEmbedding", "Part"]


@dataclass(frozen=True)
class Part:
    """A group of tokens that are averaged, and the linear head that reads their mean.

    Attributes:
        head: the classifier, or the columns of it that read these tokens.
        tokens: the tokens, as a slice of all N.
        share: the weight of this part's logits in the model's.
    """

    head: Linear
    tokens: slice
    share: float = 1.0


class ClassEmbedding(Readout):
    """p = E·LN(x) + bias, pooled as the model pools.

    Covers norm→token, norm→mean, mean→norm, models without a last norm, pairs of heads (distilled
    models) and heads that read CLS beside the mean patch.

    Args:
        parts: the groups of tokens and their heads; one for most models.
        token_norm: the norm of each token, before pooling.
        pooled_norm: the norm of the mean, after pooling.
        num_classes: C.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        token_norm: Norm | None,
        pooled_norm: Norm | None,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.token_norm = token_norm
        self.pooled_norm = pooled_norm
        self.num_classes = num_classes
        stops = [part.tokens.stop for part in self.parts]
        start = min(part.tokens.start for part in self.parts)
        self.reads = slice(start, None if None in stops else max(stops))

    @staticmethod
    def from_text_features(
        image: Readout, text_features: Tensor, scale: float = 1.0, bias: float = 0.0
    ) -> TextEmbedding:
        """Class embeddings from text, for a zero-shot classifier.

        Args:
            image: the readout that gives the image embedding: ``adapt(model).readout`` of a model
                that ends in its projection.
            text_features: one text embedding for each class, C×F.
            scale: the factor of the cosine.
            bias: added to every score.

        Returns:
            a readout with score_c = scale·cos + bias.
        """
        return TextEmbedding(image, text_features, scale, bias)

    def _rows(self, part: Part) -> slice:
        """The tokens of a part, counted within the rows that are read."""
        start, stop = part.tokens.start, part.tokens.stop
        offset = self.reads.start
        return slice(start - offset, None if stop is None else stop - offset)

    def _pooled(self, rows: Tensor, part: Part) -> Tensor:
        """The mean of a part's tokens as it enters the norm after pooling: …×1×D."""
        rows = upcast(rows[..., self._rows(part), :])
        if self.token_norm is not None:
            rows = self.token_norm(rows)
        return rows if rows.shape[-2] == 1 else rows.mean(-2, keepdim=True)

    def forward(self, rows: Tensor) -> Tensor:
        total: Tensor | None = None
        for part in self.parts:
            pooled = self._pooled(rows, part)
            if self.pooled_norm is not None:
                pooled = self.pooled_norm(pooled)
            pooled = pooled[..., 0, :]
            if len(self.parts) == 1 and part.share == 1.0:
                return part.head(pooled)
            logits = (pooled @ part.head.weight.T) * part.share
            bias = part.head.offset()
            if bias is not None:
                logits = logits + bias / len(self.parts)
            total = logits if total is None else total + logits
        assert total is not None
        return total

    def normalise(self, tokens: Tensor) -> Tensor:
        """What the classifier reads of every token, read alone: LN(x), …×D."""
        tokens = upcast(tokens)
        for norm in (self.token_norm, self.pooled_norm):
            tokens = tokens if norm is None else norm(tokens)
        return tokens

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        features = self.normalise(tokens)
        if len(self.parts) == 1:
            return _read(features, [(self.parts[0].head, 1.0)], target)
        both = [(part.head, part.share) for part in self.parts]
        # A token that no head reads (a patch of a distilled model) is read by all, as the mean is.
        same_width = len({head.weight.shape for head, _ in both}) == 1
        shape = tokens.shape[:2] if target is not None else (*tokens.shape[:2], self.num_classes)
        logits = features.new_zeros(shape)
        unread = slice(max(p.tokens.stop or tokens.shape[1] for p in self.parts), None)
        if same_width and unread.start < tokens.shape[1]:
            logits[:, unread] = _read(features[:, unread], both, target)
        for part in self.parts:
            logits[:, part.tokens] = _read(features[:, part.tokens], [(part.head, 1.0)], target)
        return logits

    def token_directions(self, tokens: Tensor, target: Tensor) -> Tensor:
        cotangent = self._token_heads(tokens.shape[1], target)
        for norm in (self.pooled_norm, self.token_norm):
            if norm is not None:
                inputs = tokens if norm is self.token_norm else self._before_pooled_norm(tokens)
                cotangent = norm.at(inputs, frozen=True).vjp(cotangent[..., None, :])[..., 0, :]
        return cotangent.expand(*tokens.shape[:2], -1)

    def _before_pooled_norm(self, tokens: Tensor) -> Tensor:
        return upcast(tokens) if self.token_norm is None else self.token_norm(tokens)

    def _token_heads(self, count: int, target: Tensor) -> Tensor:
        """The target's row of the head that reads each token alone: B×N×D."""
        rows = [part.head.weight[target] for part in self.parts]
        if len(rows) == 1:
            return rows[0][:, None]
        shares = rows[0].new_tensor([part.share for part in self.parts])
        shared = torch.einsum("pbd,p->bd", torch.stack(rows), shares)
        heads = shared[:, None].repeat(1, count, 1)
        for row, part in zip(rows, self.parts, strict=True):
            heads[:, part.tokens] = row[:, None]
        return heads

    def vjp(self, rows: Tensor, g: Tensor, frozen: bool = False, summed: bool = False) -> Tensor:
        rows = upcast(rows)
        total: Tensor | None = None
        for part in self.parts:
            read = rows[..., self._rows(part), :]
            c = self._at_token_norm(rows, part, g, frozen)
            if summed and read.shape[-2] > 1 and self.token_norm is not None:
                c = self.token_norm.vjp_sum(read, c) / read.shape[-2]
            elif summed and read.shape[-2] > 1:
                pass
            else:
                c = c if read.shape[-2] == 1 else c / read.shape[-2]
                c = c if self.token_norm is None else self.token_norm.at(read, frozen).vjp(c)
                c = c.expand(*read.shape[:-1], *c.shape[-2:])
            if len(self.parts) > 1 and not summed:
                whole = c.new_zeros(*rows.shape[:-1], *c.shape[-2:])
                whole[..., self._rows(part), :, :] = c
                c = whole
            total = c if total is None else total + c
        assert total is not None
        return total

    def _at_token_norm(self, rows: Tensor, part: Part, g: Tensor, frozen: bool) -> Tensor:
        """The cotangent of a part's mean token: …×1×K×D."""
        c = (g @ part.head.weight)[..., None, :, :]
        c = c if part.share == 1.0 else c * part.share
        if self.pooled_norm is None:
            return c
        return self.pooled_norm.at(self._pooled(rows, part), frozen).vjp(c)

    def constants(self, rows: Tensor, g: Tensor) -> tuple[Tensor, None]:
        rows = upcast(rows)
        total = g.new_zeros(g.shape[:-1])
        for part in self.parts:
            c = (g @ part.head.weight * part.share)[..., None, :, :]
            bias = part.head.offset()
            if bias is not None:
                total = total + g @ bias / len(self.parts)
            if self.pooled_norm is not None:
                total = total + along(self.pooled_norm.offset(), c)
            if self.token_norm is not None:
                c = self._at_token_norm(rows, part, g, frozen=True)
                total = total + along(self.token_norm.offset(), c)
        return total, None

    # -- All classes at once: tangents go forward to the features, one product makes them logits.
    # Features are taken before the last norm's γ and centring, which are folded into the weight.

    def jvp_features(self, rows: Tensor, tangent: Tensor) -> Tensor:
        """How the features change when one tangent is added to every row that is read.

        Args:
            rows: the hidden states read, …×Q×D.
            tangent: …×N×D, one direction for each source token.

        Returns:
            …×N×F, F = D for each part.
        """
        features = []
        for part in self.parts:
            t = tangent
            if self.token_norm is not None:
                t = self.token_norm.jvp_mean(upcast(rows[..., self._rows(part), :]), t)
            if self.pooled_norm is not None:
                if self.token_norm is not None:
                    t = self.token_norm.constant(t)
                t = self.pooled_norm.jvp_mean(self._pooled(rows, part), t)
            features.append(t)
        return torch.cat(features, -1) if len(features) > 1 else features[0]

    def frozen_shares(self, rows: Tensor) -> Tensor:
        """The weight each row has in each part's pooled features, σ frozen: B×parts×Q."""
        batch, count, _ = rows.shape
        weights = upcast(rows).new_zeros(batch, len(self.parts), count)
        for g, part in enumerate(self.parts):
            x = upcast(rows[:, self._rows(part)])
            weights[:, g, self._rows(part)] = (
                1.0 if self.token_norm is None else self.token_norm.state(x).inverse_sigma[..., 0]
            ) / x.shape[1]
        return weights

    def frozen_features(self, rows: Tensor, tangents: Tensor) -> Tensor:
        """Features from tangents that :meth:`frozen_shares` has weighted already, σ frozen.

        Args:
            rows: the hidden states read, B×Q×D.
            tangents: B×parts×N×D.

        Returns:
            B×N×F.
        """
        features = list(tangents.unbind(1))
        if self.pooled_norm is not None:
            for g, part in enumerate(self.parts):
                t = features[g]
                t = t if self.token_norm is None else self.token_norm.constant(t)
                features[g] = t * self.pooled_norm.state(self._pooled(rows, part)).inverse_sigma
        return torch.cat(features, -1) if len(features) > 1 else features[0]

    def head_weight(self, classes: Tensor | None = None) -> Tensor:
        """E as it reads these features: C×F, or K×F for some classes."""
        last = self.token_norm if self.pooled_norm is None else self.pooled_norm
        weights = []
        for part in self.parts:
            weight = part.head.weight if classes is None else part.head.weight[classes]
            weight = weight if last is None else last.fold(weight)
            weights.append(weight if part.share == 1.0 else weight * part.share)
        return torch.cat(weights, -1) if len(weights) > 1 else weights[0]


def _read(features: Tensor, heads: Sequence[tuple[Linear, float]], target: Tensor | None) -> Tensor:
    """Σ share·head(features), for all classes or for one class an image."""
    out: Tensor | None = None
    for head, share in heads:
        weight, bias = head.weight, head.offset()
        if target is None:
            logits = features @ weight.T
            logits = logits if bias is None else logits + bias
        else:
            logits = (features @ weight[target][..., None])[..., 0]
            logits = logits if bias is None else logits + bias[target][:, None]
        out = logits * share if out is None else out + logits * share
    assert out is not None
    return out
