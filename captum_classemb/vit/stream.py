"""Follow the derivative of a score back along the rows that the readout reads.

Every other token is held constant, so a block costs no more than its few rows do: the block itself
is run on these rows alone, with the keys and values of all tokens from the recorded pass. The
model's own modules compute each step, whatever their order of norms, scales and gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import wide
from captum_classemb.hooks import after, hooks_removed, keep_output
from captum_classemb.vit.parts import Attention, Block, Call, ViT
from captum_classemb.vit.record import ALL, Recording, _Recorder

__all__ = ["BlockDerivative", "block_derivative", "record_stream", "runs_alone"]


def runs_alone(vit: ViT, rows: slice) -> bool:
    """Whether the rows are few and a block can be run on them without the other tokens.

    Not so where the readout reads the patches, where attention is more than one softmax or holds
    biases for all pairs of tokens, or where it is no module apart from its block.
    """
    if rows.stop is None or not 0 <= rows.start < rows.stop <= vit.prefix_tokens:
        return False
    nothing = Call((), {})
    return all(
        (type(attention).weights is Attention.weights or attention.shows_weights)
        and attention.bias(nothing, rows) is None
        and attention.module is not block.module
        for block in vit.blocks
        for attention in block.attentions
    )


def record_stream(
    vit: ViT, inputs: Tensor, rows: slice, forward_args: tuple[Any, ...] = ()
) -> Recording:
    """One forward pass that keeps what :func:`block_derivative` needs, and the attention tails.

    Returns:
        a recording of ``"values"``, ``"keys"``, ``"attn_tail"``, ``"resid_pre"`` and
        ``"resid_post"``, the last three at the rows, and what is added to their dot products.
    """
    sites = dict.fromkeys(("attn_tail", "resid_pre", "resid_post"), rows)
    recorder = _StreamRecorder(vit, sites | {"values": ALL, "keys": ALL}, rows)
    with recorder.hooked(), torch.no_grad():
        logits = vit(inputs, *forward_args)
    return recorder.finish(logits)


class _StreamRecorder(_Recorder):
    def __init__(self, vit: ViT, wanted: dict[str, slice], rows: slice) -> None:
        super().__init__(vit, wanted, set(range(len(vit.blocks))))
        self.rows = rows
        self.bias: list[tuple[Tensor | None, ...]] = [()] * len(vit.blocks)

    def _read_memories(self, index: int, attention: Attention, call: Call) -> None:
        super()._read_memories(index, attention, call)
        self.bias[index] = (*self.bias[index], attention.bias(call, self.rows))

    def finish(self, logits: Tensor) -> Recording:
        recording = super().finish(logits)
        recording.sites["bias"] = list(self.bias)
        return recording


class BlockDerivative:
    """A block run on some rows, ready to carry cotangents of its output back.

    Args:
        block: the block.
        entering: ``resid_pre`` at the rows, B×Q×D.
        keys: keys of all tokens of each attention module, B×H×N×d.
        values: values of all tokens of each attention module, B×H×N×d.
        biases: what each module adds to the dot products of the rows, or None.
        rows: the rows, as a slice of all tokens.
        copies: m, how many cotangents of an image are carried back at once. The rows are run m
            times side by side, each copy by itself, so that matrix products carry all of them.

    Attributes:
        output: ``resid_post`` at the rows, B×Q×D, detached.
        weights: the attention of the rows in each module, B×H×Q×N, detached.
    """

    def __init__(
        self,
        block: Block,
        entering: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        rows: slice,
        copies: int = 1,
    ) -> None:
        self.copies = copies
        self.weights: list[Tensor] = []
        self._mixed: list[Tensor] = []
        with torch.enable_grad():
            self._leaf = entering.detach().repeat_interleave(copies, 0).requires_grad_(True)
            self._output = self._run(block, list(zip(keys, values, biases, strict=True)), rows)
        self.output = self._output.detach()[::copies]

    def _run(
        self, block: Block, recorded: list[tuple[Tensor, Tensor, Tensor | None]], rows: slice
    ) -> Tensor:
        handles = []
        for attention, tokens in zip(block.attentions, recorded, strict=True):
            inner: dict[nn.Module, Tensor] = {}

            def replace(
                args: tuple[Any, ...],
                kwargs: Any,
                output: Any,
                attention: Attention = attention,
                tokens: tuple[Tensor, Tensor, Tensor | None] = tokens,
                inner: dict[nn.Module, Tensor] = inner,
            ) -> Any:
                rewritten = self._attend(
                    attention, Call(args, kwargs, output, inner), *tokens, rows
                )
                return (rewritten, *output[1:]) if isinstance(output, tuple) else rewritten

            handles += [keep_output(watched, inner) for watched in attention.watch]
            handles.append(after(attention.module, replace))
        # A block of class attention is handed the patches first: there are none here.
        others = [self._leaf[:, :0]] * block.stream
        with hooks_removed(handles):
            output = block.module(*others, self._leaf)
        rewritten: Tensor = output[0] if isinstance(output, tuple) else output
        return rewritten

    def _attend(
        self,
        attention: Attention,
        call: Call,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        rows: slice,
    ) -> Tensor:
        """What attention returns for the rows, given the keys and values of all tokens.

        The rows' own keys and values are among the recorded ones already; only their derivative
        is added, by a difference that is zero. Nothing the size of all keys is copied.
        """
        width, count = keys.shape[2], rows.stop - rows.start
        query = wide(attention.queries(call, ALL))
        own_key, own_value = wide(attention.keys(call)), wide(attention.values(call))
        key, value = wide(keys), wide(values)
        moved = query.detach() @ (own_key - own_key.detach()).transpose(-2, -1)
        scores = self._together(query) @ key.transpose(-2, -1)
        scores = scores + F.pad(self._together(moved), (rows.start, width - rows.stop))
        scores = scores * attention.scale()
        if bias is not None:
            bias = bias.to(scores.dtype)
            several = bias.dim() > 1 and bias.shape[-2] > 1
            scores = scores + (bias.tile(self.copies, 1) if several else bias)
        weights = scores.softmax(-1)
        self.weights.append(weights.detach()[:, :, :count])
        held = self._apart(weights.detach()[..., rows], count)
        moved_value = held @ (own_value - own_value.detach())
        mixed = weights @ value + self._together(moved_value)
        self._mixed.append(mixed)
        x = self._apart(mixed, count).transpose(1, 2).flatten(2)
        for step in attention.inner(call, ALL):
            x = step(x)
        projected: Tensor = attention.proj.module(x.to(values.dtype))
        return projected

    def _together(self, heads: Tensor) -> Tensor:
        """(B·m)×H×Q×· to B×H×(m·Q)×·: what shares the keys and values of one image."""
        if self.copies == 1:
            return heads
        by_image: Tensor = heads.unflatten(0, (-1, self.copies))
        return by_image.transpose(1, 2).flatten(2, 3)

    def _apart(self, heads: Tensor, count: int) -> Tensor:
        """B×H×(m·Q)×· to (B·m)×H×Q×·."""
        if self.copies == 1:
            return heads
        by_copy: Tensor = heads.unflatten(2, (self.copies, count))
        return by_copy.transpose(1, 2).flatten(0, 1)

    def pull(self, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Carry cotangents of the block's output back.

        Args:
            cotangent: (B·m)×Q×D, the copies of an image one after another.

        Returns:
            the cotangent of the block's input, of the same shape, and for each attention module
            that of A·V, B×H×(m·Q)×d; its product with the values is that of A.
        """
        entering, *mixed = torch.autograd.grad(
            self._output,
            [self._leaf, *self._mixed],
            cotangent.to(self._output.dtype),
            retain_graph=True,
        )
        return entering, mixed


def block_derivative(
    vit: ViT, recording: Recording, index: int, rows: slice, copies: int = 1
) -> BlockDerivative:
    """The derivative of one recorded block along the rows.

    Raises:
        UnsupportedModelError: if the block, run on the rows alone, gives another output than in
            the recorded pass.
    """
    derivative = BlockDerivative(
        vit.blocks[index],
        recording["resid_pre"][index],
        recording["keys"][index],
        recording["values"][index],
        recording["bias"][index],
        rows,
        copies,
    )
    recorded = recording["resid_post"][index]
    difference = (derivative.output - recorded).abs().max()
    # Under autocast the recorded pass was rounded to the dtype of the values.
    dtypes = (recorded.dtype, recording["values"][index][0].dtype)
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    if difference > 8 * rounding * (1 + recorded.abs().max()):
        raise UnsupportedModelError(
            f"block {index} of {type(vit.model).__qualname__} gives another output when it is run "
            "on the rows of the readout alone, so no derivative can be followed along them."
        )
    return derivative
