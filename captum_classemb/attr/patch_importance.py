"""The patches a prediction rests on, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_classemb.attr._base import PatchAttribution
from captum_classemb.attr._heads import head_count, stack_heads
from captum_classemb.attr._inputs import images
from captum_classemb.attr.gradient import sum_outputs
from captum_classemb.functional.importance import normalised, positive_evidence
from captum_classemb.functional.objectives import Objective, logit_gradient, paper_weights
from captum_classemb.functional.precision import wide
from captum_classemb.readout import Readout
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

    Two estimates of the evidence that attention carries from token j into the rows the readout
    reads, relu(A · v_j · z) for each block and head, are each divided by their sum and added:

    - *local*: z comes from the class embedding read at the block's own attention output, with the
      objective that Vilas et al. (2023) published;
    - *stream*: z is the exact derivative of log p along the rows that the readout reads (the CLS
      token for most models), with all other tokens held constant. It is followed back through
      norms, attention and MLPs of these rows alone, so no backward pass through the network is
      needed.

    Where the readout reads the patches themselves (mean or attention pooling), every row is read
    and following all of them would be a backward pass; the stream estimate then holds the branches
    of later blocks constant, and the derivative reaches each block along the residual stream
    alone. The same is done where attention adds biases to query·key.

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
            both = self._both(self._record(pixels, args), index)
        return self._to_grid(both, pixels)

    def _along_rows(self) -> bool:
        return runs_alone(self.vit, self.readout.reads)

    def _record(self, pixels: Tensor, args: tuple[Any, ...] = ()) -> Recording:
        reads = self.readout.reads
        if self._along_rows():
            return record_stream(self.vit, pixels, reads, args)
        sites = {"values": ALL, "attention": reads, "attn_tail": reads, "resid_post": reads}
        return record(self.vit, pixels, sites, forward_args=args)

    def _both(self, recording: Recording, target: Tensor) -> Tensor:
        """The two estimates, each divided by its sum, added: B×L×H×N."""
        local, stream = [], []
        deltas = self._local_derivatives(recording, target)
        depth, along = len(deltas), self._along_rows()
        final = recording["resid_post"][-1]
        cotangent = _pull(self.readout.at(depth - 1, "resid_post"), final, target, "cross_entropy")
        for block in reversed(range(depth)):
            if along:
                derivative = block_derivative(self.vit, recording, block, self.readout.reads)
                weights = derivative.weights
                cotangent, directions = derivative.pull(cotangent)
            else:
                weights = recording["attention"][block]
                directions = _directions(recording, block, cotangent)
            values = recording["values"][block]
            here = _directions(recording, block, deltas[block])
            local.append(stack_heads(map(_evidence, weights, here, values)))
            stream.append(stack_heads(map(_evidence, weights, directions, values)))
        local_, stream_ = (torch.stack(parts[::-1], 1) for parts in (local, stream))
        return normalised(local_, (1, 2, 3)) + normalised(stream_, (1, 2, 3))

    def _local_derivatives(self, recording: Recording, target: Tensor) -> Sequence[Tensor]:
        """∂score/∂attn_out of each block: B×Q×D."""
        outputs = [sum_outputs(tails) for tails in recording["attn_tail"]]
        readouts = [self.readout.at(block, "attn_out") for block in range(len(outputs))]
        if any(readout is not readouts[0] for readout in readouts):
            pairs = zip(readouts, outputs, strict=True)
            return [_pull(readout, rows, target, "paper") for readout, rows in pairs]
        # One product with the class embedding for all blocks instead of one for each.
        stacked = torch.cat(outputs)
        return _pull(readouts[0], stacked, target.repeat(len(outputs)), "paper").chunk(len(outputs))

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
            recording = self._record(pixels)
            if self._along_rows() and _rows_alike(recording):
                maps = self._all_classes(recording, index)
            else:
                maps = torch.stack([self._one_class(recording, int(c)) for c in index], 1)
        return self._to_grid(maps, pixels)

    def _one_class(self, recording: Recording, c: int) -> Tensor:
        target = torch.full((len(recording.logits),), c, device=recording.logits.device)
        return self._both(recording, target).sum((1, 2))

    def _all_classes(self, recording: Recording, classes: Tensor) -> Tensor:
        """B×K×N: matrix products over classes for each block."""
        depth, rows = len(self.vit.blocks), self.readout.reads
        final = recording["resid_post"][-1]
        last = self.readout.at(depth - 1, "resid_post")
        cotangents = _pull_classes(last, final, classes, "cross_entropy")
        followed = _Followed(cotangents)
        local, stream = _Evidence(cotangents), _Evidence(cotangents)
        for block in reversed(range(depth)):
            derivative = block_derivative(self.vit, recording, block, rows, followed.at_once)
            outputs = sum_outputs(recording["attn_tail"][block])
            readout = self.readout.at(block, "attn_out")
            deltas = _pull_classes(readout, outputs, classes, "paper")
            here = _directions(recording, block, deltas.flatten(1, 2))
            values, weights = recording["values"][block], derivative.weights
            for module, directions in enumerate(followed.pull(derivative)):
                local.add(weights[module], here[module], values[module])
                stream.add(weights[module], directions, values[module])
        return normalised(local.total(), (2,)) + normalised(stream.total(), (2,))


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
        by_basis = mixed.unflatten(2, (self.count, self.rows)).flatten(3)
        by_class: Tensor = (self.shares[:, None] @ by_basis).unflatten(3, (self.rows, -1))
        return by_class.flatten(2, 3)


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


def _pull(readout: Readout, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """The derivative of the objective with respect to the rows: B×Q×D."""
    gradient = logit_gradient(readout(rows), target, objective)
    pulled: Tensor = readout.pull(rows, gradient)
    return pulled


def _pull_classes(
    readout: Readout,
    rows: Tensor,
    classes: Tensor,
    objective: Literal["paper", "cross_entropy"],
) -> Tensor:
    """The same for K classes: B×K×Q×D, from ∂logit_c, p and r alone."""
    p, r = paper_weights(readout(rows))
    cotangents = readout.pull_each(rows, classes) - readout.pull(rows, p)[:, None]
    if objective == "cross_entropy":
        return cotangents
    return cotangents * p[:, classes, None, None] - readout.pull(rows, r)[:, None]


def _directions(recording: Recording, block: int, delta: Tensor) -> list[Tensor]:
    """Cotangents of A·V in each module, B×H×Q×d, from that of what they add to the rows."""
    pairs = zip(recording["attn_tail"][block], recording["values"][block], strict=True)
    return [
        tail.pull(delta).unflatten(-1, (values.shape[1], -1)).transpose(1, 2)
        for tail, values in pairs
    ]


def _evidence(weights: Tensor, directions: Tensor, values: Tensor) -> Tensor:
    """B×H×N along the cotangents of A·V."""
    return positive_evidence(weights, directions @ wide(values).transpose(-2, -1))
