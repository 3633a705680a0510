"""One forward pass, and all of it that the contractions of the attributions read.

Of each block one copy is made: its value vectors (and keys, where they are asked for) with the rows
that the readout reads beside them, in one piece of memory for all blocks. Fused attention stays on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import no_autocast, upcast
from captum_classemb.hooks import after, before, changes_by_hand, hooks_removed
from captum_classemb.readout.output_path import OutputPath
from captum_classemb.readout.steps import stacked
from captum_classemb.vit.active_edits import refuse_edits
from captum_classemb.vit.checks import Checks, reading
from captum_classemb.vit.memories import ForwardPass, Kept, Stage, stages_of
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Attention, Block, Call
from captum_classemb.vit.record import SiteRecorder

__all__ = ["forward_pass"]

ALL = slice(None)


def forward_pass(
    vit: ViT,
    inputs: Tensor,
    rows: slice,
    *,
    blocks: Sequence[int] | None = None,
    attention: bool = False,
    keys: bool = False,
    norms: bool = False,
    sites: Mapping[str, slice] | None = None,
    site_blocks: Sequence[int] | None = None,
    forward_args: tuple[Any, ...] = (),
    tolerance: float,
) -> ForwardPass:
    """Run the model once, without gradients.

    Args:
        vit: an adapted model.
        inputs: images, B×3×H×W.
        rows: the query rows, those that the readout reads.
        blocks: the blocks whose memories are kept; all by default.
        attention: keep A of the query rows.
        keys: keep keys.
        norms: keep the norms of the patch tokens that enter the last block.
        sites: kept of the same pass as :func:`~captum_classemb.vit.record` keeps them.
        site_blocks: the blocks of which sites are kept; all by default.
        forward_args: further positional arguments of the model.
        tolerance: of the identities that are compared.

    Raises:
        UnsupportedModelError: if a block is called twice or not at all.
    """
    chosen = list(range(len(vit.blocks))) if blocks is None else sorted(set(blocks))
    refuse_edits(of_attention=True)
    recorder = _Recorder(vit, rows, chosen, attention, keys, tolerance)
    recorder.reads_norms = norms
    beside = SiteRecorder.of(vit, sites, site_blocks) if sites else None
    with recorder.hooked(), beside.hooked() if beside else nullcontext(), torch.no_grad():
        logits = vit(inputs, *forward_args)
    with no_autocast(inputs.device), reading(recorder.checks.model):
        done = recorder.finish(logits)
    done.recording = beside.finish(logits) if beside else None
    done.norms = recorder.norms
    return done


@lru_cache(maxsize=32)
def _head_columns(
    heads: int, width: int, scale: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(H·d)×H, which takes each head's part of a query to a column of its own, times a scale."""
    with torch.inference_mode(False):
        eye = torch.eye(heads, dtype=dtype, device=device)
        return eye.repeat_interleave(width, 0) * scale


class _Recorder:
    """The hooks of one pass.

    Where few rows are read and a block has one attention module and one MLP, the rows lie beside
    the values (``beside``): what the MLP wrote waits for the copy that the next block makes.
    """

    def __init__(
        self,
        vit: ViT,
        rows: slice,
        chosen: list[int],
        attention: bool,
        keys: bool,
        tolerance: float,
    ) -> None:
        self.vit, self.rows, self.chosen = vit, rows, chosen
        self.attention, self.keys = attention, keys
        self.checks = Checks(vit.model, tolerance)
        self.kept: list[dict[int, Kept]] = [{} for _ in vit.blocks]
        self.beside = len(chosen) == len(vit.blocks) and all(map(self._regular, vit.blocks))
        self.entered = -1
        self.left: tuple[Tensor, int | None] | None = None
        self.pre = torch.empty(0)
        self.mlp: list[Tensor] = []
        self.stream: list[tuple[Tensor, Tensor, Tensor]] = []
        self.buffer: Tensor | None = None
        self.free: Iterator[Tensor] = iter(())
        self.scores: list[Tensor] = []
        self.depth = 0
        self.reads_norms = False
        self.norms: Tensor | None = None

    def _regular(self, block: Block) -> bool:
        stop = self.rows.stop
        few = stop is not None and 0 < stop <= max(self.vit.prefix_tokens, 1)
        few &= block.attentions[0].heads == self.vit.blocks[0].attentions[0].heads
        single = len(block.attentions) == len(block.mlps) == 1 and not block.parallel
        return few and single and block.attentions[0].module is not block.module

    # -- hooks

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        with hooks_removed(handles):
            handles += [before(self.vit.model, self._enter), after(self.vit.model, self._leave)]
            for index, block in enumerate(self.vit.blocks):
                handles.append(before(block.module, self._heard(self._enter_block, index)))
                if index in self.chosen:
                    for i, attention in enumerate(block.attentions):
                        handles += self._watch(index, i, attention)
                    for mlp in block.mlps:
                        handles += self._watch_mlp(mlp)
                handles.append(after(block.module, self._heard(self._leave_block, index)))
            yield

    # A hook of the user's may run the model on other images: that pass is not heard.
    def _enter(self, args: Any, kwargs: Any) -> None:
        self.depth += 1

    def _leave(self, args: Any, kwargs: Any, output: Any) -> None:
        self.depth -= 1

    def _heard(self, hook: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        def heard(*call: Any) -> Any:
            if self.depth > 1:
                return None
            with reading(self.checks.model):
                return hook(*first, *call)

        return heard

    def _enter_block(self, index: int, args: tuple[Any, ...], kwargs: Any) -> None:
        name = type(self.vit.model).__qualname__
        if index != self.entered + 1:
            raise UnsupportedModelError(
                f"block {index} of {name} is called after block {self.entered}: blocks that are "
                "shared, left out or called in another order are not read."
            )
        self.entered = index
        x = Call(args, kwargs).argument(self.vit.blocks[index].stream)
        self.pre = x[:, self.rows]
        if self.reads_norms and index == len(self.vit.blocks) - 1:
            wide = torch.promote_types(x.dtype, torch.float32)
            patches = x[:, self.vit.prefix_tokens :]
            self.norms = torch.linalg.vector_norm(patches, dim=-1, dtype=wide)
        if self.left is None:
            return
        (left, version), self.left = self.left, None
        if x is left and (version is None or x._version == version):
            return
        if x.shape != left.shape:
            by_hand = changes_by_hand(self.vit.model)
            raise UnsupportedModelError(
                f"block {index} of {name} takes {tuple(x.shape)} where block {index - 1} left "
                f"{tuple(left.shape)}: tokens that change between blocks are not read"
                + (f" (cause: {by_hand}?)." if by_hand else ".")
            )
        what = "the tokens left by the block before, at the input"
        self.checks.equal(what, [index], upcast(x)[None], upcast(left)[None])

    def _leave_block(self, index: int, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        post = output[0] if isinstance(output, tuple) else output
        self.left = (post, None if post.is_inference() else post._version)
        last = index == len(self.vit.blocks) - 1
        if self.beside and not last:
            return
        if last:
            rows = [post[:, self.rows], *(self.mlp if self.beside else ())]
            self.ends = torch.stack(rows)
        if self.beside:
            pass
        elif index in self.chosen:
            self._compare_block(index, upcast(post[:, self.rows]))
            self.mlp.clear()

    def _compare_block(self, index: int, post: Tensor) -> None:
        """The block adds its branches to the stream, at the rows, while they are at hand."""
        block, total = self.vit.blocks[index], upcast(self.pre)
        with no_autocast(post.device):
            attn = [
                OutputPath.of([s.read() for s in attention.outer], upcast(kept.output)).output
                for attention, kept in zip(block.attentions, self._modules(index), strict=True)
                if kept.output is not None
            ]
            mlp = [
                OutputPath.of([s.read() for s in mlp.outer], upcast(out)).output
                for mlp, out in zip(block.mlps, self.mlp, strict=True)
            ]
            written = sum(mlp[1:], mlp[0])
            total = sum(attn, total) + written
            self.checks.equal("outputs", [index], total[None], post[None])
        if self.keys:
            self.stream.append((upcast(self.pre).clone(), written, post.clone()))

    def _modules(self, index: int) -> list[Kept]:
        name, found = type(self.vit.model).__qualname__, self.kept[index]
        count = len(self.vit.blocks[index].attentions)
        if len(found) != count:
            raise UnsupportedModelError(
                f"attention of block {index} was not reached: {name} did not call that module in "
                "its forward pass."
            )
        return [found[i] for i in range(count)]

    def _watch(self, index: int, number: int, attention: Attention) -> list[RemovableHandle]:
        calls: list[Call] = []

        def start(args: tuple[Any, ...], kwargs: Any) -> None:
            calls[:] = [Call(args, kwargs)]

        def inside(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if calls:
                calls[0].inner[module] = output
                calls[0].entered[module] = Call(args, kwargs).input

        def end(args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            call = calls.pop()
            call.output = output
            self.kept[index][number] = self._keep(attention, call)

        handles = [before(attention.module, self._heard(start))]
        for module in {*attention.watch, attention.proj.module}:
            handles.append(after(module, self._heard(inside, module)))
        handles.append(after(attention.module, self._heard(end)))
        return handles

    def _watch_mlp(self, mlp: MLP) -> list[RemovableHandle]:
        entered: list[Tensor] = []

        def enter(args: tuple[Any, ...], kwargs: Any) -> None:
            entered[:] = [Call(args, kwargs).input[:, self.rows]]

        def end(args: Any, kwargs: Any, output: Tensor) -> None:
            rows = output[:, self.rows]
            self.mlp.append(mlp.output(entered.pop() if entered else None, rows))

        handles = []
        if mlp.proj.columns is not None:
            handles.append(before(mlp.fc2, self._heard(enter)))
        return [*handles, after(mlp.module, self._heard(end))]

    def _keep(self, attention: Attention, call: Call) -> Kept:
        values, output = attention.values(call), attention.output(call, self.rows)
        batch, heads, count, width = values.shape
        if self.buffer is None:
            # A row of the stream as wide as a token's values is laid out by heads beside them.
            self.beside &= output.shape[-1] == heads * width and output.dtype == values.dtype
        pieces = [values, attention.keys(call)] if self.keys else [values]
        if self.beside:
            rows = [output, self.pre, self.mlp.pop() if self.mlp else self.pre]
            pieces += [r.unflatten(-1, (heads, width)).transpose(1, 2) for r in rows]
        slot = self._slot(pieces)
        torch.cat(pieces, 2, out=slot)
        inner = tuple(step.read() for step in attention.inner(call, self.rows))
        reads = any(not step.uniform for step in inner)
        return Kept(
            slot[:, :, :count],
            slot[:, :, count : 2 * count] if self.keys else None,
            self._weights(attention, call) if self.attention else None,
            attention.bias_left(call, self.rows) if self.keys else None,
            inner,
            attention.mixed(call, self.rows).clone() if reads else None,
            None if self.beside else output.clone(),
        )

    def _slot(self, pieces: list[Tensor]) -> Tensor:
        """Memory for one block's copy, taken for all blocks at once."""
        batch, heads, _, width = pieces[0].shape
        shape = (batch, heads, sum(piece.shape[2] for piece in pieces), width)
        if self.buffer is None:
            modules = sum(len(self.vit.blocks[i].attentions) for i in self.chosen)
            self.buffer = pieces[0].new_empty(modules, *shape)
            self.free = iter(self.buffer)
        if self.buffer.shape[1:] != shape or self.buffer.dtype != pieces[0].dtype:
            return pieces[0].new_empty(shape)
        return next(self.free)

    def _weights(self, attention: Attention, call: Call) -> Tensor | None:
        """A of the query rows; of one row its scores alone: the softmax is of all blocks."""
        if not (self.beside and attention.plain_softmax(call, self.rows)):
            return attention.weights(call, self.rows)
        query, key = attention.queries(call, self.rows), attention.keys(call)
        batch, heads, rows, width = query.shape
        beside = key.transpose(1, 2)
        if rows > 1 or batch * heads == 1 or beside.stride(2) != width * beside.stride(3):
            return attention.weights(call, self.rows)
        # Heads side by side in one product, so that no key is copied.
        dtype = torch.promote_types(query.dtype, torch.float32)
        spread = _head_columns(heads, width, attention.scale(), dtype, query.device)
        with no_autocast(query.device):
            by_head = query.transpose(1, 2).reshape(batch, heads * width, 1) * spread
            self.scores.append(torch.bmm(upcast(beside.flatten(2)), by_head))
        return None

    # -- after the pass

    def finish(self, logits: Tensor) -> ForwardPass:
        if self.entered != len(self.vit.blocks) - 1:
            raise UnsupportedModelError(
                f"block {self.entered + 1} of {type(self.vit.model).__qualname__} was not reached "
                "in its forward pass."
            )
        kept = [self._modules(index) for index in self.chosen]
        if self.scores:
            alike = len({scores.shape for scores in self.scores}) == 1
            scores = torch.stack(self.scores) if alike else self.scores
            shared = (
                scores.mT.softmax(-1)[..., None, :]
                if isinstance(scores, Tensor)
                else [one.mT.softmax(-1)[..., None, :] for one in scores]
            )
            without = [m for modules in kept for m in modules if m.weights is None]
            for module, weights in zip(without, shared, strict=True):
                module.weights = weights
        done = ForwardPass(upcast(logits), upcast(self.ends[0]), [], self.checks, self.rows)
        if self.beside:
            self._beside(done, kept)
        elif self.stream:
            streams = zip(*self.stream, strict=True)
            done.resid_pre, done.mlp_out, done.resid_post = map(torch.stack, streams)
        done.stages = stages_of(self.vit, self.chosen, kept, self.keys)
        if self.attention:
            for stage in done.stages:
                self._compare_attention(stage)
        if self.beside:
            outs = [stage.attn_out for stage in done.stages]
            attn_out = outs[0] if len(outs) == 1 else torch.cat(outs)
            assert done.resid_pre is not None and done.mlp_out is not None
            assert done.resid_post is not None
            done.resid_mid = done.resid_pre + attn_out
            total = done.resid_mid + done.mlp_out
            self.checks.equal("outputs", self.chosen, total, done.resid_post)
        return done

    def _beside(self, done: ForwardPass, kept: list[list[Kept]]) -> None:
        """The rows that lie beside the values: outputs of attention, the stream, and MLPs."""
        assert self.buffer is not None
        count = done.final.shape[1]
        laid = self.buffer[:, :, :, -3 * count :].unflatten(3, (3, count))
        rows = upcast(laid.permute(3, 0, 1, 4, 2, 5).flatten(-2))
        for index, modules in enumerate(kept):
            modules[0].output = rows[0, index]
        done.resid_pre = rows[1]
        # What enters a block, and what its MLP wrote, lie beside the values of the next.
        done.resid_post, written = torch.cat([rows[1:, 1:], upcast(self.ends)[:, None]], 1)
        outer = [
            tuple(step.read() for step in self.vit.blocks[i].mlps[0].outer) for i in self.chosen
        ]
        steps = stacked(outer)
        if steps is not None:
            done.mlp_out = OutputPath.of(steps, written).output
        else:
            each = [OutputPath.of(o, w).output for o, w in zip(outer, written, strict=True)]
            done.mlp_out = torch.stack(each)

    def _compare_attention(self, stage: Stage) -> None:
        """A·V through the steps up to W_O is what attention returned, at the query rows."""
        for number, memories in enumerate(stage.modules):
            assert memories.attention is not None
            attention = self.vit.blocks[stage.blocks[0]].attentions[number]
            count = len(memories.path.steps) - len(attention.outer)
            mixed = memories.attention @ upcast(memories.values)
            rebuilt = OutputPath.of(memories.path.steps[:count], mixed.transpose(2, 3).flatten(3))
            steps = memories.path.inputs[count:]
            real = steps[0] if steps else memories.path.output
            self.checks.equal("attention outputs", stage.blocks, rebuilt.output, real)
