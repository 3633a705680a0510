"""What is left of a forward pass: attention modules of alike blocks, read as memories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_classemb.functional.precision import upcast
from captum_classemb.readout.linear import Linear
from captum_classemb.readout.output_path import OutputPath
from captum_classemb.readout.steps import Step, stacked
from captum_classemb.vit.checks import Checks
from captum_classemb.vit.linearised import BlockCalls
from captum_classemb.vit.model import ViT
from captum_classemb.vit.record import Recording

__all__ = ["ForwardPass", "Kept", "Memories", "Stage", "stages_of"]


@dataclass
class Memories:
    """One attention module of each of L alike blocks, read as memories.

    Attributes:
        values: v, L×B×H×N×d, in the model's dtype.
        keys: as they enter the dot products, L×B×H×N×d; None unless asked for.
        attention: A at the query rows, L×B×H×Q×N; None unless asked for.
        bias: what is added to the dot products of the query rows, by block; for keys alone.
        path: from A·V to the residual stream, at the query rows.
    """

    values: Tensor
    keys: Tensor | None
    attention: Tensor | None
    bias: list[Tensor | None]
    path: OutputPath


@dataclass
class Stage:
    """L blocks that are alike, or one block.

    Attributes:
        blocks: which.
        modules: their attention modules, almost always one.
    """

    blocks: list[int]
    modules: list[Memories]

    @property
    def attn_out(self) -> Tensor:
        """What attention adds to the stream at the query rows: L×B×Q×D."""
        return sum((m.path.output for m in self.modules[1:]), self.modules[0].path.output)


@dataclass
class ForwardPass:
    """What is left of one forward pass.

    Attributes:
        logits: the model's own.
        final: the residual stream after the last block, at the rows read, B×Q×D.
        stages: the blocks that are read, in order.
        resid_pre, mlp_out, resid_post: the stream at the rows read, L×B×Q×D, where rows are few.
        resid_mid: the same after attention, where blocks are regular.
        checks: identities to be compared at the end of the call.
        rows: the query rows.
        recording: further sites, where they were asked for.
        rebuilt: the model's own readout of ``final``, where these are the rows it reads.
        calls: what the modules of every block were called with, where all tokens are followed.
        norms: of the patch tokens that enter the last block, B×(N − P), where they were asked for.
    """

    logits: Tensor
    final: Tensor
    stages: list[Stage]
    checks: Checks
    rows: slice
    recording: Recording | None = None
    rebuilt: Tensor | None = None
    resid_pre: Tensor | None = None
    mlp_out: Tensor | None = None
    resid_post: Tensor | None = None
    resid_mid: Tensor | None = None
    calls: list[BlockCalls] | None = None
    norms: Tensor | None = None


@dataclass
class Kept:
    """What is kept of one attention module of one block."""

    values: Tensor
    keys: Tensor | None
    weights: Tensor | None
    bias: Tensor | None
    inner: tuple[Step, ...]
    mixed: Tensor | None
    output: Tensor | None


def stages_of(vit: ViT, chosen: list[int], kept: list[list[Kept]], keys: bool) -> list[Stage]:
    """All blocks as one stage if they are alike, or a stage for each."""
    shapes = {tuple(k.values.shape for k in modules) for modules in kept}
    made = [_made(vit, index) for index in chosen] if keys else []
    if len(shapes) == 1 and all(each == made[0] for each in made):
        stage = _stage(vit, chosen, kept)
        if stage is not None:
            return [stage]
    stages = []
    for index, modules in zip(chosen, kept, strict=True):
        stage = _stage(vit, [index], [modules])
        assert stage is not None
        stages.append(stage)
    return stages


def _made(vit: ViT, index: int) -> tuple[Any, ...]:
    """What blocks share if the same steps make their queries, keys, values and MLPs."""
    block = vit.blocks[index]
    paths = [p for a in block.attentions for p in (a.entry, a.query_steps, a.key_steps)]
    paths += [a.projections or () for a in block.attentions]
    paths += [(*m.entry, *(m.hidden or ()), m.proj, *m.outer) for m in block.mlps]
    return tuple(tuple(_shape_of(step) for step in path) for path in paths)


def _stage(vit: ViT, blocks: list[int], kept: list[list[Kept]]) -> Stage | None:
    found = []
    for number, column in enumerate(zip(*kept, strict=True)):
        attentions = [vit.blocks[i].attentions[number] for i in blocks]
        paths = [
            (*k.inner, a.proj.read(), *(step.read() for step in a.outer))
            for k, a in zip(column, attentions, strict=True)
        ]
        steps = stacked(paths)
        if steps is None:
            if len(paths) > 1:
                return None
            steps = paths[0]
        found.append(
            Memories(
                _joined([k.values for k in column]),
                None if column[0].keys is None else _joined([k.keys for k in column]),
                None if column[0].weights is None else _joined([k.weights for k in column]),
                [k.bias for k in column],
                _output_path(steps, len(column[0].inner), column),
            )
        )
    return Stage(blocks, found)


def _shape_of(step: Step) -> Any:
    if not isinstance(step, Linear):
        return step.likeness()
    module: Any = step.module
    return type(step), getattr(module, "in_features", None), getattr(module, "out_features", None)


def _output_path(steps: tuple[Step, ...], inner: int, column: Sequence[Kept]) -> OutputPath:
    """The path with what entered its steps: A·V where a norm reads it, W_O's output at the end."""
    output = upcast(_joined([k.output for k in column]))
    outer = OutputPath.of(steps[inner + 1 :], output)
    if column[0].mixed is None:
        inputs: tuple[Tensor, ...] = (output[..., :0],) * (inner + 1)
    else:
        before_w_o = OutputPath.of(steps[:inner], upcast(_joined([k.mixed for k in column])))
        inputs = (*before_w_o.inputs, before_w_o.output)
    return OutputPath(steps, (*inputs, *outer.inputs), outer.output)


def _joined(tensors: Sequence[Tensor | None]) -> Tensor:
    """L tensors as one, without a copy where they follow each other in memory."""
    first = tensors[0]
    assert first is not None
    if len(tensors) == 1:
        return first[None]
    step = first.numel() and tensors[1].storage_offset() - first.storage_offset()  # type: ignore[union-attr]
    base = first.untyped_storage().data_ptr()
    follow = all(
        t is not None
        and t.untyped_storage().data_ptr() == base
        and t.stride() == first.stride()
        and t.storage_offset() == first.storage_offset() + i * step
        for i, t in enumerate(tensors)
    )
    if follow and step > 0:
        return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
    return torch.stack(list(tensors))  # type: ignore[arg-type]
