"""The patches a prediction rests on, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.attr._forward_pass import Classes, Needs
from captum_classemb.attr.memory import attention_of, direct_entries, direct_maps
from captum_classemb.attr.refine import Refinable
from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.attention import carried
from captum_classemb.functional.importance import combined
from captum_classemb.functional.objectives import check_objective
from captum_classemb.functional.precision import no_autocast, upcast
from captum_classemb.functional.sinks import sinks, without_sinks
from captum_classemb.readout import ClassEmbedding, Readout
from captum_classemb.vit.memories import ForwardPass
from captum_classemb.vit.stream import RowStream, follows_rows

__all__ = ["PatchImportance"]

_ROWS = 2048
"""Rows that are carried back at once: enough for fast products, few enough for memory."""

_NUMBERS = 1 << 23
"""Numbers of evidence that are formed at once, likewise."""


class PatchImportance(Refinable):
    """What speaks for the target in each patch: the map to reach for.

    Three estimates of the evidence that attention carries from token j into the rows the readout
    reads (the CLS token for most models), A · v_j · z for each block and head:

    - *stream* (s): z is the exact derivative of the objective along these rows, with all other
      tokens held constant, and only what speaks for the target counts: relu(A · v_j · z). The
      derivative is followed back through norms, attention and MLPs of these rows alone, so no
      backward pass through the network is needed;
    - *logit* (d): z reads what goes straight to the target's logit, with every σ frozen: the
      entries of the exact ledger of :class:`MemoryPatchImportance`;
    - *contrast* (c): the same for the objective, the log-probability, which sets the target
      against the other probable classes.

    Each is divided by Σ|map| over patches, and with the shares s, d, c the map is (s + d + c)·√s.
    A map says where evidence lies, not how much of it: its scale has no unit. Negative scores
    speak against the target. A sink, a patch token whose norm is above three times its image's
    median where the last block reads it, carries next to nothing of its own patch: it scores no
    higher than a quarter of the other patches do.

    Where the readout reads the patches themselves (mean or attention pooling), every row is read
    and following all of them would be a backward pass; the stream estimate then holds the branches
    of later blocks constant, and the derivative reaches each block along the residual stream
    alone. The same is done where attention adds biases to query·key. For a readout that is not
    affine with its norms frozen, its derivative stands in the ledger's place.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.
        objective (str, optional): ``"log_probability"``, or ``"logit"`` for s and c too (then
            c = d), the one to take for multi-label heads. A model with one logit is explained by
            it. Default: ``"log_probability"``

    Raises:
        InputError: if the objective has no such value.
        UnsupportedModelError: if the model is not supported.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> model, image = demo_vit(), torch.rand(1, 3, 64, 64)
        >>> importance = PatchImportance(model)
        >>> importance.attribute(image, target=7).shape
        torch.Size([1, 3, 64, 64])
        >>> importance.attribute_classes(image).shape
        torch.Size([1, 10, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        readout: nn.Module | None = None,
        objective: Literal["log_probability", "logit"] = "log_probability",
    ) -> None:
        check_objective(objective, ("log_probability", "logit"))
        super().__init__(model, readout)
        self.objective = objective

    def needs(self) -> Needs:
        reads, blocks = self.readout.reads, tuple(self.blocks)
        along = follows_rows(self.vit, reads)
        return Needs(reads, blocks, attention=not along, keys=along, norms=True)

    def _estimates(self, done: ForwardPass, classes: Classes) -> tuple[Tensor, Tensor, Tensor]:
        """s, d and c: L×B×H×K×(N − P)."""
        readout, final = self.last_readout, done.final
        logits = self.model_logits(done)
        of_logit = self.weights(logits, classes, "logit")
        of_objective = of_logit
        if self._weighting != "logit":
            of_objective = self.weights(logits, classes, self._weighting, of_logit)
        u = _directions(readout, final, torch.cat([of_logit, of_objective], 1))
        stream, attention = self._stream(done, readout.vjp(final, of_objective))
        direct = [direct_entries(s, a, u) for s, a in zip(done.stages, attention, strict=True)]
        d, c = self._patches(_by_head(direct)).chunk(2, 3)
        return self._patches(stream).relu(), d, c

    def _summed(self, done: ForwardPass, classes: Classes) -> Tensor:
        """(s + d + c)·√s of the shares, each estimate divided by Σ|map|: B×K×(N − P)."""
        return self._spared(done, combined(*self._estimates(done, classes), heads=(0, 2)))

    def _entries(self, done: ForwardPass, classes: Classes) -> list[Tensor]:
        """The same by block and head; a sink's entries shrink as its sum does."""
        s, d, c = self._estimates(done, classes)
        entries = combined(s, d, c, heads=(0, 2), apart=True)
        whole = entries.sum((0, 2), keepdim=True)
        spared = self._spared(done, whole[0, :, 0])[:, None]
        part = torch.where(spared == whole[0], 1.0, spared / whole[0])
        return [entries * part]

    @staticmethod
    def _spared(done: ForwardPass, maps: Tensor) -> Tensor:
        """Maps of the patches (B×K×(N − P)) in which no sink stands out."""
        if done.norms is None or done.norms.shape[-1] != maps.shape[-1]:
            return maps
        return without_sinks(maps, sinks(done.norms)[:, None])

    @property
    def _weighting(self) -> str:
        # Each estimate is divided by its sum, so a factor of an image and class is none of its
        # business; log-odds differ from the log-probability by one, and lose no digits.
        return "log_odds" if self.objective == "log_probability" else "logit"

    def _stream(self, done: ForwardPass, cotangent: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """A·v·z of every block (L×B×H×K×N) up to a factor, with A of each stage and module."""
        if not follows_rows(self.vit, done.rows):
            attention = [attention_of(stage) for stage in done.stages]
            each = [
                torch.cat(
                    [
                        carried(a, m.values, m.path.vjp(cotangent.expand(len(a), *cotangent.shape)))
                        for a, m in zip(weights, stage.modules, strict=True)
                    ],
                    2,
                )
                for stage, weights in zip(done.stages, attention, strict=True)
            ]
            return _by_head(each), attention
        stream = RowStream(self.vit, done)
        found = []
        for block in reversed(range(len(self.vit.blocks))):
            cotangent, _, by_module = stream.vjp(block, cotangent)
            by_row = torch.cat(by_module, 1) if len(by_module) > 1 else by_module[0]
            found.append((by_row[:, :, 0] if by_row.shape[2] == 1 else by_row.sum(2))[None])
        return _by_head(found[::-1]), stream.attention

    # -- Many classes of a linear head. What a block does to a cotangent is linear, so where there
    # are more classes than dimensions it is followed back for the dimensions alone.

    def class_maps(self, done: ForwardPass, index: Tensor) -> Tensor:
        readout = self.last_readout
        paths = [memories.path for stage in done.stages for memories in stage.modules]
        one_way = all(path.uniform or path.output.shape[2] == 1 for path in paths)
        along = follows_rows(self.vit, done.rows) and one_way
        if len(index) <= self._AT_ONCE or not (along and isinstance(readout, ClassEmbedding)):
            return super().class_maps(done, index)
        with torch.inference_mode(False), no_autocast(done.logits.device), self._reading():
            return self._linear_head(done, readout, index)

    def _linear_head(self, done: ForwardPass, readout: ClassEmbedding, index: Tensor) -> Tensor:
        """B×K×(N − P): matrix products over classes for each block."""
        final, logits = done.final, self.model_logits(done)
        every = Classes(index.expand(len(logits), -1))
        cotangents = self._of_all(logits, index, lambda g: readout.vjp(final, g))
        stream = RowStream(self.vit, done)
        back, evidence = _Back(cotangents.transpose(1, 2)), _Evidence()
        for block in reversed(range(len(self.vit.blocks))):
            weights, values = stream.memories(block)
            for module, z in enumerate(back.vjp(stream, block)):
                evidence.add(weights[module], z, upcast(values[module]))
        features = direct_maps(readout, final, done.stages, stream.attention)
        features = features[:, self.vit.prefix_tokens :]
        head = readout.head_weight

        def read(g: Tensor) -> Tensor:
            return features @ (g @ head()).mT

        d = features @ head(every.index[0]).T
        if self.objective == "logit":
            c = d
        else:
            mean = features @ (logits.softmax(-1) @ head())[..., None]
            c = d - mean
            top = logits.argmax(-1)[:, None]
            plain = read(self.weights(logits, Classes(top), self._weighting))
            c = torch.where((index == top)[:, None], plain, c)
        s = self._patches(evidence.total()).flatten(0, 1)[:, None]
        d, c = (part.transpose(1, 2).flatten(0, 1)[:, None] for part in (d, c))
        maps: Tensor = combined(s, d, c).unflatten(0, (len(logits), -1))
        return self._spared(done, maps)

    def _of_all(self, logits: Tensor, index: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
        """The cotangents of K classes, B×Q×K×D, from one product with the class embedding.

        (e_c − p)/(1 − p_c) = e_c − q loses no digits but for the class on top, which is apart.
        """
        one_hot = torch.zeros(len(index), logits.shape[1], dtype=logits.dtype, device=logits.device)
        one_hot.scatter_(1, index[:, None], 1.0)
        each = vjp(one_hot.expand(len(logits), -1, -1))
        if self.objective == "logit":
            return each
        p, top = logits.softmax(-1), logits.argmax(-1)[:, None]
        rest = (1.0 - p[:, index])[:, None, :, None]
        plain = vjp(self.weights(logits, Classes(top), "log_odds"))
        return torch.where((index == top)[:, None, :, None], plain, (each - vjp(p[:, None])) / rest)


class _Back:
    """Cotangents of K classes on their way back: themselves, or a basis of all cotangents.

    Args:
        cotangents: of the rows, B×K×Q×D.
    """

    def __init__(self, cotangents: Tensor) -> None:
        batch, count, rows, width = cotangents.shape
        self.shares: Tensor | None = None
        if count > rows * width:
            self.shares = cotangents.flatten(2)
            basis = torch.eye(rows * width, dtype=cotangents.dtype, device=cotangents.device)
            cotangents = basis.view(1, -1, rows, width).expand(batch, -1, -1, -1)
        at_once = max(1, _ROWS // (batch * rows))
        self.chunks = [chunk.transpose(1, 2) for chunk in cotangents.split(at_once, 1)]

    def vjp(self, stream: RowStream, block: int) -> list[Tensor]:
        """One block further back; the cotangents of A·V of each module, B×H×K×Q×d."""
        found = [stream.vjp(block, chunk) for chunk in self.chunks]
        self.chunks = [entering for entering, _, _ in found]
        weights, _ = stream.memories(block)
        modules = zip(weights, zip(*(z for _, z, _ in found), strict=True), strict=True)
        return [self._of_classes(torch.cat(parts, 2), a.shape[1]) for a, parts in modules]

    def _of_classes(self, z: Tensor, heads: int) -> Tensor:
        # B×Q×K×(H·d); of the basis one product makes classes, the shares being read once.
        if self.shares is not None:
            z = z.transpose(1, 2)
            z = (self.shares @ z.flatten(2)).unflatten(2, z.shape[2:]).transpose(1, 2)
        by_head: Tensor = z.unflatten(-1, (heads, -1)).permute(0, 3, 2, 1, 4)
        return by_head


class _Evidence:
    """Positive evidence of K classes, summed over blocks and heads."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._buffer: Tensor | None = None

    def add(self, weights: Tensor, directions: Tensor, values: Tensor) -> None:
        """relu(Σ_q A[q, j] · z[q]·v_j) of one module.

        Args:
            weights: A, B×H×Q×N.
            directions: z, the cotangents of A·V, B×H×K×Q×d.
            values: v, B×H×N×d.
        """
        # A·v once for all classes, instead of A times their K×N products.
        weighted = (weights.mT[..., None] * values[:, :, :, None]).flatten(3).mT
        by_class = directions.flatten(3)
        batch, heads, classes = by_class.shape[:3]
        size = batch * classes * weighted.shape[-1]
        at_once = max(1, min(heads, _NUMBERS // size))
        for start in range(0, heads, at_once):
            some = slice(start, start + at_once)
            pair = (by_class[:, some].flatten(0, 1), weighted[:, some].flatten(0, 1))
            # The same memory every time: fresh pages would cost more than the product.
            if self._buffer is None or len(self._buffer) != len(pair[0]):
                self._buffer = pair[0].new_empty(len(pair[0]), classes, weighted.shape[-1])
            torch.bmm(*pair, out=self._buffer).relu_()
            by_head = self._buffer.view(batch, -1, *self._buffer.shape[1:])
            part = by_head[:, 0] if by_head.shape[1] == 1 else by_head.sum(1)
            self._total = part.clone() if self._total is None else self._total.add_(part)

    def total(self) -> Tensor:
        """B×K×N."""
        assert self._total is not None
        return self._total


def _by_head(parts: list[Tensor]) -> Tensor:
    """L×B×H×K×N of several stages as one, with zeros where a block has fewer heads."""
    most = max(part.shape[2] for part in parts)
    padded = [
        part if part.shape[2] == most else F.pad(part, (0, 0) * 2 + (0, most - part.shape[2]))
        for part in parts
    ]
    return torch.cat(padded) if len(padded) > 1 else padded[0]


def _directions(readout: Readout, rows: Tensor, g: Tensor) -> Tensor:
    """How the rows reach Σ_c g_c·logit_c with every σ frozen: B×Q×K×D."""
    try:
        return readout.vjp(rows, g, frozen=True)
    except UnsupportedModelError:
        return readout.vjp(rows, g)
