"""The patches a prediction rests on, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_classemb.attr._base import PatchAttribution
from captum_classemb.attr._direct import direct_features, directions_of_heads
from captum_classemb.attr._heads import head_count
from captum_classemb.attr._inputs import images
from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.attention import attention_contributions
from captum_classemb.functional.importance import combined
from captum_classemb.functional.objectives import logit_gradient
from captum_classemb.functional.precision import wide
from captum_classemb.readout import ClassEmbedding, Readout
from captum_classemb.vit import ALL, Recording, record
from captum_classemb.vit.stream import (
    BlockDerivative,
    block_derivative,
    record_stream,
    runs_alone,
)

__all__ = ["PatchImportance"]

_ROWS = 512
"""Rows that are carried back at once: enough for fast products, few enough for memory."""


class PatchImportance(PatchAttribution):
    """What speaks for the target in each patch: the map to reach for.

    Three estimates of the evidence that attention carries from token j into the rows the readout
    reads (the CLS token for most models), A · v_j · z for each block and head:

    - *stream*: z is the exact derivative of log p along these rows, with all other tokens held
      constant, and only what speaks for the target counts: relu(A · v_j · z). The derivative is
      followed back through norms, attention and MLPs of these rows alone, so no backward pass
      through the network is needed;
    - *logit*: z reads what goes straight to the target's logit, with every σ held: the entries of
      the exact ledger of :class:`MemoryPatchImportance`;
    - *contrast*: the same for log p, which sets the target against the other probable classes.

    Each is divided by Σ|map| over patches, and with the shares s, d, c the map is (s + d + c)·√s.
    A map says where evidence lies, not how much of it: its scale has no unit. Negative scores
    speak against the target.

    Where the readout reads the patches themselves (mean or attention pooling), every row is read
    and following all of them would be a backward pass; the stream estimate then holds the branches
    of later blocks constant, and the derivative reaches each block along the residual stream
    alone. The same is done where attention adds biases to query·key. For a readout that is not
    affine with its norms held, its derivative stands in the ledger's place.

    Args:
        model (nn.Module): a supported Vision Transformer.
        readout (Readout, optional): maps features to logits. Default: the class embedding.

    Raises:
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

    def __init__(self, model: nn.Module, readout: Readout | None = None) -> None:
        super().__init__(model, readout)
        head_count(self.vit)

    def _patch_scores(self, pixels: Tensor, target: Any, args: tuple[Any, ...]) -> Tensor:
        index = self._targets(target, pixels)
        # Derivatives along a few rows are taken by autograd, also inside inference_mode.
        with torch.inference_mode(False), torch.no_grad():
            entries = self._entries(self._record(pixels, args), index)
        return self._on_grid(entries, pixels)

    def _along_rows(self) -> bool:
        return runs_alone(self.vit, self.readout.reads)

    def _record(self, pixels: Tensor, args: tuple[Any, ...] = ()) -> Recording:
        reads = self.readout.reads
        if self._along_rows():
            return record_stream(self.vit, pixels, reads, args)
        sites = {"values": ALL, "attention": reads, "attn_tail": reads, "resid_post": reads}
        return record(self.vit, pixels, sites, forward_args=args)

    def _last(self) -> Readout:
        return self.readout.at(len(self.vit.blocks) - 1, "resid_post")

    def _entries(self, recording: Recording, target: Tensor) -> Tensor:
        """The combined estimates of every block and head, for the patches: B×L×H×(N − P)."""
        readout, final = self._last(), recording["resid_post"][-1]
        logits = readout(final)
        one_hot = logit_gradient(logits, target, "logit")
        contrast = logit_gradient(logits, target, "cross_entropy")
        u = torch.stack([_direction(readout, final, g) for g in (one_hot, contrast)], 1)
        estimates = []
        for step in self._stream(recording, readout.pull(final, contrast)):
            values, tails = recording["values"][step.block], recording["attn_tail"][step.block]
            direct = directions_of_heads(tails, u, [v.shape[1] for v in values], hold=True)
            by_module = []
            for a, v, z, further in zip(step.weights, values, step.directions, direct, strict=True):
                by_module.append(attention_contributions(a, v, torch.cat([z[:, None], further], 1)))
            estimates.append(torch.cat(by_module, 2))
        by_block = torch.stack(estimates[::-1], 2)[..., self.vit.prefix_tokens :]
        stream, logit, against = by_block.flatten(2, 3).unbind(1)
        by_head: Tensor = combined(stream.relu(), logit, against).unflatten(1, by_block.shape[2:4])
        return by_head

    def _stream(self, recording: Recording, cotangent: Tensor) -> Iterator[_Step]:
        """Carry the derivative of the final rows back, last block first."""
        along = self._along_rows()
        for block in reversed(range(len(self.vit.blocks))):
            if along:
                derivative = block_derivative(self.vit, recording, block, self.readout.reads)
                cotangent, directions = derivative.pull(cotangent)
                yield _Step(block, derivative.weights, directions)
            else:
                tails = recording["attn_tail"][block]
                heads = [v.shape[1] for v in recording["values"][block]]
                directions = directions_of_heads(tails, cotangent[:, None], heads, hold=False)
                yield _Step(block, recording["attention"][block], [z[:, 0] for z in directions])

    # -- Many classes share the forward pass. What a block does to a cotangent is linear, so where
    # there are more classes than dimensions it is followed back for the dimensions alone.

    def attribute_classes(
        self, inputs: Tensor | tuple[Tensor, ...], classes: Sequence[int] | None = None
    ) -> Tensor:
        pixels = images(self.vit, inputs)
        index = self._classes(classes, pixels)
        if index is None:
            index = torch.arange(self.readout.num_classes, device=pixels.device)
        with torch.inference_mode(False), torch.no_grad():
            recording, readout = self._record(pixels), self._last()
            one_way = self._along_rows() and _rows_alike(recording)
            if one_way and isinstance(readout, ClassEmbedding):
                maps = self._all_classes(recording, readout, index)
            else:
                maps = torch.stack([self._one_class(recording, int(c)) for c in index], 1)
        return self._on_grid(maps, pixels)

    def _one_class(self, recording: Recording, c: int) -> Tensor:
        target = torch.full((len(recording.logits),), c, device=recording.logits.device)
        return self._entries(recording, target).sum((1, 2))

    def _all_classes(
        self, recording: Recording, readout: ClassEmbedding, classes: Tensor
    ) -> Tensor:
        """B×K×(N − P): matrix products over classes for each block."""
        final = recording["resid_post"][-1]
        p = readout(final).softmax(-1)
        cotangents = readout.pull_each(final, classes) - readout.pull(final, p)[:, None]
        followed, evidence = _Followed(cotangents), _Evidence(cotangents)
        attention = []
        for block in reversed(range(len(self.vit.blocks))):
            rows = self.readout.reads
            derivative = block_derivative(self.vit, recording, block, rows, followed.at_once)
            attention.append(derivative.weights)
            values = recording["values"][block]
            for module, directions in enumerate(followed.pull(derivative)):
                evidence.add(derivative.weights[module], directions, values[module])
        features = direct_features(
            readout,
            final,
            recording["attn_tail"],
            attention[::-1],
            recording["values"],
            range(head_count(self.vit)),
        )
        logit = features @ readout.head_weight(classes).T
        contrast = logit - features @ (p @ readout.head_weight())[..., None]
        estimates = (evidence.total(), logit.transpose(1, 2), contrast.transpose(1, 2))
        patches = (part[..., self.vit.prefix_tokens :] for part in estimates)
        maps = combined(*(part.flatten(0, 1)[:, None] for part in patches))
        by_class: Tensor = maps[:, 0].unflatten(0, (len(p), -1))
        return by_class


class _Step(NamedTuple):
    """A block on the way back: A (B×H×Q×N) and the cotangents of A·V (B×H×Q×d) of its modules."""

    block: int
    weights: Sequence[Tensor]
    directions: Sequence[Tensor]


class _Followed:
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
        count = cotangents.shape[1]
        #: How many of an image are carried back at once.
        self.at_once = min(count, max(1, _ROWS // (batch * rows)))
        missing = -count % self.at_once
        padded = torch.cat([cotangents, cotangents[:, :missing]], 1)
        self.count, self.rows = count, rows
        self.chunks = [chunk.flatten(0, 1) for chunk in padded.split(self.at_once, 1)]

    def pull(self, derivative: BlockDerivative) -> list[Tensor]:
        """One block further back; the cotangents of A·V of each module, B×H×(K·Q)×d."""
        found = [derivative.pull(chunk) for chunk in self.chunks]
        self.chunks = [entering for entering, _ in found]
        modules = zip(*(mixed for _, mixed in found), strict=True)
        return [self._of_classes(torch.cat(parts, 2)) for parts in modules]

    def _of_classes(self, mixed: Tensor) -> Tensor:
        mixed = mixed[:, :, : self.count * self.rows]
        if self.shares is None:
            return mixed
        # One product for all heads, B×K×R with B×R×(H·Q·d): the shares are read once.
        heads = mixed.shape[1]
        by_basis = mixed.unflatten(2, (self.count, self.rows)).transpose(1, 2).flatten(2)
        by_class: Tensor = (self.shares @ by_basis).unflatten(2, (heads, self.rows, -1))
        return by_class.transpose(1, 2).flatten(2, 3)


class _Evidence:
    """Positive evidence of K classes, summed over blocks and heads.

    Args:
        like: a tensor that begins B×K.
    """

    def __init__(self, like: Tensor) -> None:
        self.count = like.shape[1]
        self._total: Tensor | None = None
        self._buffer: Tensor | None = None

    def add(self, weights: Tensor, directions: Tensor, values: Tensor) -> None:
        """relu(Σ_q A[q, j] · z[q]·v_j) of one module.

        Args:
            weights: A, B×H×Q×N.
            directions: z, the cotangents of A·V, B×H×(K·Q)×d.
            values: v, B×H×N×d.
        """
        # A·v once for all classes, instead of A times their K×N products.
        weighted = weights.transpose(-2, -1)[..., None] * wide(values)[:, :, :, None]
        weighted = weighted.flatten(3).transpose(-2, -1)
        by_class = directions.unflatten(2, (self.count, -1)).flatten(3)
        for head in range(weights.shape[1]):
            # The same memory for every head: fresh pages would cost more than the product.
            pair = (by_class[:, head], weighted[:, head])
            self._buffer = torch.bmm(*pair, out=self._buffer).relu_()
            if self._total is None:
                self._total = torch.zeros_like(self._buffer)
            self._total += self._buffer

    def total(self) -> Tensor:
        """B×K×N."""
        assert self._total is not None
        return self._total


def _rows_alike(recording: Recording) -> bool:
    """Whether one row is read, or all rows take the same way from A·V."""
    tails = [tail for block in recording["attn_tail"] for tail in block]
    return all(tail.uniform or tail.output.shape[1] == 1 for tail in tails)


def _direction(readout: Readout, rows: Tensor, g: Tensor) -> Tensor:
    """How the rows reach Σ_c g_c·logit_c with every σ held: B×Q×D."""
    try:
        return readout.hold(rows).pull(g)
    except UnsupportedModelError:
        pulled: Tensor = readout.pull(rows, g)
        return pulled
