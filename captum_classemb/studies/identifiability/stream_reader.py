"""Read what a block returns without a product of its own: it is the sum of what is read already.

With the last norm's γ and centring folded into the class embedding, logits are Wx/σ + b. But for σ
that is linear in x, and a block returns its input plus what attention and MLP add. So the products
of the three sites of a block are two, those of its input and of what is between attention and MLP
none, and no token is normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classemb.errors import NonFiniteError
from captum_classemb.functional.norm import normalise
from captum_classemb.readout import ClassEmbedding, Readout
from captum_classemb.studies.token_reader import TokenScores, chunk_rows
from captum_classemb.vit import Recording

__all__ = ["StreamReader", "StreamScores"]

_BRANCHES = ("attn_out", "mlp_out")


@dataclass(frozen=True)
class StreamScores:
    """What is kept of the logits of all tokens.

    Attributes:
        sites: scores after each block, of what each attention adds, and of what each MLP adds;
            with the best class after a block, and whether it is that of the layers.
        embedding: the target's logits before the first block, B×N.
        middle: those between attention and MLP of each block, L×B×N; None if not recorded.
    """

    sites: dict[str, list[TokenScores]]
    embedding: Tensor
    middle: Tensor | None


class StreamReader:
    """Reads all blocks with a class embedding of one head and at most one norm.

    Args:
        readout: such a class embedding, see :meth:`reads`.
    """

    def __init__(self, readout: ClassEmbedding) -> None:
        (part,) = readout.parts
        self.norm = readout.token_norm or readout.pooled_norm
        weight, bias = part.head.weight, part.head.offset()
        shift = None if self.norm is None else self.norm.offset()
        if shift is not None:
            bias = weight @ shift.to(weight) + (0.0 if bias is None else bias)
        self.bias = bias
        self.matrix = (weight if self.norm is None else self.norm.fold(weight)).T.contiguous()
        self.num_classes = readout.num_classes

    @staticmethod
    def reads(readout: Readout, recording: Recording) -> bool:
        """Whether the tokens recorded can be read so, and lose nothing in float32."""
        if not isinstance(readout, ClassEmbedding) or len(readout.parts) > 1:
            return False
        if readout.token_norm is not None and readout.pooled_norm is not None:
            return False
        norm = readout.token_norm or readout.pooled_norm
        embedding: Tensor = recording["embedding"][0]
        tokens = [x for site in ("resid_post", *_BRANCHES) for x in recording[site]]
        same = all(x.shape == embedding.shape and x.dtype == torch.float32 for x in tokens)
        return same and (norm is None or (norm.groups == 1 and norm.eps is not None))

    def _sigma(self, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        """σ and 1/σ of each token, R×1."""
        if self.norm is None or self.norm.eps is None:
            return None
        inverse = normalise(tokens, self.norm.eps, self.norm.kind).inverse_sigma
        return inverse.reciprocal(), inverse

    def scores(self, recording: Recording, target: Tensor) -> StreamScores:
        """Ranks, target logits and best classes of every token.

        Args:
            recording: with ``embedding``, ``resid_post``, ``attn_out``, ``mlp_out``, and
                ``resid_mid`` if its logits are wanted.
            target: class indices, B.

        Raises:
            NonFiniteError: if a target's logit is NaN or infinite.
        """
        embedding: Tensor = recording["embedding"][0]
        shape, depth = embedding.shape[:2], len(recording["resid_post"])
        own = target[:, None].expand(shape).flatten()
        taken = _Taken(depth, len(own), embedding)
        size = min(chunk_rows(self.num_classes, embedding.device), len(own))
        # Chunks of the same size, so that none is left with a few rows.
        size = -(-len(own) // -(-len(own) // size))
        room = torch.empty(4, size, self.num_classes, device=embedding.device)
        matrix = self.matrix.to(embedding.device)
        with torch.no_grad():
            for start in range(0, len(own), size):
                rows = slice(start, min(start + size, len(own)))
                held = room[:, : rows.stop - start]
                self._read_rows(recording, rows, own[rows, None], matrix, held, taken)
        if not torch.isfinite(taken.logit).all():
            raise NonFiniteError("a token's logit is NaN or infinite: a rank needs finite numbers.")
        return taken.scores(shape, "resid_mid" in recording.sites)

    def _read_rows(
        self,
        recording: Recording,
        rows: slice,
        own: Tensor,
        matrix: Tensor,
        room: Tensor,
        taken: _Taken,
    ) -> None:
        def some(site: str, block: int) -> Tensor:
            tokens: Tensor = recording[site][block]
            return tokens.flatten(0, 1)[rows]

        stream, *branch, free = room
        torch.mm(some("embedding", 0), matrix, out=stream)
        taken.before[-1, rows] = self._value(stream, some("embedding", 0), own)
        for block in range(len(recording["resid_post"])):
            for index, site in enumerate(_BRANCHES):
                stream.add_(torch.mm(some(site, block), matrix, out=branch[index]))
                if not index and "resid_mid" in recording.sites:
                    middle = some("resid_mid", block)
                    taken.before[block, rows] = self._value(stream, middle, own)
            after, inverse = self._shifted(stream, some("resid_post", block), free)
            # Before the values are written over.
            best = after.max(-1, keepdim=True).indices
            taken.top[block, rows] = best[:, 0]
            taken.read(0, block, rows, after, inverse, own)
            for index, site in enumerate(_BRANCHES):
                held = branch[index]
                values, inverse = self._shifted(held, some(site, block), held)
                same = values.gather(1, best) == values.amax(-1, keepdim=True)
                taken.match[index, block, rows] = same[:, 0]
                taken.read(1 + index, block, rows, values, inverse, own)

    def _value(self, raw: Tensor, tokens: Tensor, own: Tensor) -> Tensor:
        """The target's logits of some rows."""
        value, sigma = raw.gather(1, own), self._sigma(tokens)
        value = value if sigma is None else value * sigma[1]
        return (value if self.bias is None else value + self.bias.to(value)[own])[:, 0]

    def _shifted(self, raw: Tensor, tokens: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """σ times the logits, which have the same order, and 1/σ; written to ``out``."""
        sigma = self._sigma(tokens)
        if self.bias is None:
            return (raw if raw is out else out.copy_(raw)), None if sigma is None else sigma[1]
        bias = self.bias.to(raw)
        if sigma is None:
            return torch.add(raw, bias, out=out), None
        return torch.addr(raw, sigma[0][:, 0], bias, out=out), sigma[1]


class _Taken:
    """What has been taken down of the rows that were read.

    Args:
        depth: L.
        rows: number of all tokens.
        like: on the device wanted.
    """

    def __init__(self, depth: int, rows: int, like: Tensor) -> None:
        self.rank = like.new_empty(3, depth, rows)
        self.logit = like.new_empty(3, depth, rows)
        self.match = like.new_empty(2, depth, rows, dtype=torch.bool)
        self.top = like.new_empty(depth, rows, dtype=torch.int64)
        self.before = like.new_empty(depth + 1, rows)

    def read(
        self,
        site: int,
        block: int,
        rows: slice,
        values: Tensor,
        inverse: Tensor | None,
        own: Tensor,
    ) -> None:
        """Take down rank and logit of some rows; the values (σ times the logits) are lost."""
        value = values.gather(1, own)
        self.logit[site, block, rows] = (value if inverse is None else value * inverse)[:, 0]
        torch.ge(values, value, out=values)
        torch.sum(values, -1, out=self.rank[site, block, rows])

    def scores(self, shape: torch.Size, middle: bool) -> StreamScores:
        """By block and site, as B×N."""
        ranks = (self.rank - 1).to(torch.int32).unflatten(-1, shape)
        logits, matches = self.logit.unflatten(-1, shape), self.match.unflatten(-1, shape)
        tops = self.top.unflatten(-1, shape)[..., None]
        nothing = self.match.new_empty(0)
        sites = {
            name: [
                TokenScores(
                    ranks[index, block],
                    logits[index, block],
                    tops[block] if index == 0 else tops[block][..., :0],
                    nothing if index == 0 else matches[index - 1, block],
                )
                for block in range(len(tops))
            ]
            for index, name in enumerate(("resid_post", *_BRANCHES))
        }
        before = self.before.unflatten(-1, shape)
        return StreamScores(sites, before[-1], before[:-1] if middle else None)
