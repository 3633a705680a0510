"""A model made linear at its values, and derivatives carried back through whole blocks of it.

Attention, the σ of norms and the gates f(x)/x of activations keep the values of one forward pass;
of a gated MLP each branch takes half. What is left of a block is a chain of matrices, and the way
back a chain of their transposes: no derivative of a softmax, none of a weight. Attention is
computed once more from the queries and keys of the pass, one block after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.hooks import after, before, hooks_removed
from captum_classemb.readout.activation import Activation
from captum_classemb.readout.output_path import OutputPath
from captum_classemb.readout.steps import Step
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Attention, Block, Call

__all__ = ["BlockCalls", "carried_back", "calls_kept", "refuse_unknown_steps"]


@dataclass
class BlockCalls:
    """What the modules of one block were called with in a forward pass; tensors are not copied.

    Attributes:
        tokens: what entered the block, B×N×D; for class attention CLS before the patches.
        attentions: the calls of its attention modules.
        hidden: what the first layers of each MLP returned, and in which version.
        written: what each MLP returned.
    """

    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    attentions: list[Call] = field(default_factory=list)
    hidden: list[list[tuple[Tensor, int]]] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)


def refuse_unknown_steps(vit: ViT) -> None:
    """Raise UnsupportedModelError unless the adapter says how every block makes its branches."""
    for block in vit.blocks:
        for attention in block.attentions:
            if attention.projections is None:
                raise _unknown(vit, attention.module, "how values are made of the tokens")
        for mlp in block.mlps:
            if mlp.hidden is None:
                raise _unknown(vit, mlp.module, "what lies before the last layer")
            for step in mlp.hidden:
                if isinstance(step, Activation) and not step.gates:
                    raise _unknown(vit, mlp.module, "a gate for an activation that is not 0 at 0")


def _unknown(vit: ViT, module: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"paths through all tokens of {type(vit.model).__qualname__} cannot be followed: for "
        f"{type(module).__qualname__} its adapter does not say {what}; take PatchImportance."
    )


@contextmanager
def calls_kept(vit: ViT) -> Iterator[list[BlockCalls]]:
    """Within the context a forward pass leaves the calls of every block's modules.

    Raises:
        UnsupportedModelError: if the adapter does not say how every block makes its branches.
    """
    refuse_unknown_steps(vit)
    kept = [BlockCalls() for _ in vit.blocks]
    depth = [0]

    # A hook of the user's may run the model on other images: that pass is not heard.
    def heard(hook: Callable[..., None]) -> Callable[..., None]:
        return lambda *call: hook(*call) if depth[0] <= 1 else None

    def enter(args: Any, kwargs: Any) -> None:
        depth[0] += 1

    def leave(args: Any, kwargs: Any, output: Any) -> None:
        depth[0] -= 1

    handles = [before(vit.model, enter), after(vit.model, leave)]
    with hooks_removed(handles):
        for block, calls in zip(vit.blocks, kept, strict=True):
            handles.append(before(block.module, heard(_entering(block, calls))))
            for number, attention in enumerate(block.attentions):
                handles += _watch_attention(attention, calls, number, heard)
            for number, mlp in enumerate(block.mlps):
                handles += _watch_mlp(mlp, calls, number, heard)
        yield kept


def _entering(block: Block, calls: BlockCalls) -> Callable[..., None]:
    def hook(args: tuple[Any, ...], kwargs: Any) -> None:
        call = Call(args, kwargs)
        tokens = call.argument(block.stream)
        calls.tokens = torch.cat([tokens, call.argument(0)], 1) if block.stream else tokens
        calls.attentions = [Call((), {}) for _ in block.attentions]
        calls.hidden = [[] for _ in block.mlps]
        calls.written = [tokens for _ in block.mlps]

    return hook


def _watch_attention(
    attention: Attention, calls: BlockCalls, number: int, heard: Callable[..., Any]
) -> list[RemovableHandle]:
    def start(args: tuple[Any, ...], kwargs: Any) -> None:
        calls.attentions[number] = Call(args, kwargs)

    def end(args: Any, kwargs: Any, output: Any) -> None:
        calls.attentions[number].output = output

    def inside(module: nn.Module) -> Callable[..., None]:
        def hook(args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            call = calls.attentions[number]
            call.inner[module] = output
            call.entered[module] = Call(args, kwargs).input

        return hook

    # A block that is itself the module starts its call when the block does.
    handles = [before(attention.module, heard(start))]
    handles += [after(module, heard(inside(module))) for module in dict.fromkeys(attention.watch)]
    return [*handles, after(attention.module, heard(end))]


def _watch_mlp(
    mlp: MLP, calls: BlockCalls, number: int, heard: Callable[..., Any]
) -> list[RemovableHandle]:
    def first(args: Any, kwargs: Any, output: Tensor) -> None:
        calls.hidden[number].append((output, _version(output)))

    def end(args: Any, kwargs: Any, output: Tensor) -> None:
        calls.written[number] = output

    layer: Any = (mlp.hidden or ())[0]
    handles = [after(module, heard(first)) for module in layer.modules]
    if all(step.uniform for step in mlp.outer):
        return handles
    return [*handles, after(mlp.module, heard(end))]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def carried_back(
    block: Block, calls: BlockCalls, cotangent: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Cotangents of a linear block's output carried back to its input.

    Args:
        block: the block.
        calls: of its modules.
        cotangent: of the rows (B×Q×K×D); of all other tokens it is 0.
        rows: which tokens these are.

    Returns:
        the cotangents of all tokens that enter (B×N×K×D), and Σ bias · cotangent over the
        block's biases (B×K).
    """
    x = upcast(calls.tokens)
    # Class attention writes to CLS alone, and hands the patches on.
    rows = slice(0, 1) if block.stream else rows
    written = cotangent[:, :1] if block.stream else cotangent
    middle = x[:, rows]
    if not block.parallel:
        for attention, call in zip(block.attentions, calls.attentions, strict=True):
            middle = middle + _added(attention, call, rows)
    onto, bias = written, written.new_zeros(len(x), written.shape[2])
    for mlp, hidden, output in zip(block.mlps, calls.hidden, calls.written, strict=True):
        chain = _mlp_chain(mlp, hidden, output, middle, rows)
        back, offsets = _back(chain, written)
        onto, bias = onto + back, bias + offsets
    entering = written.new_zeros(*x.shape[:2], *written.shape[2:])
    for attention, call in zip(block.attentions, calls.attentions, strict=True):
        chain = _output_chain(attention, call, middle, rows)
        z, offsets = _back(chain, written if block.parallel else onto)
        back, more = _through_values(attention, call, x, rows, z)
        entering, bias = entering + back, bias + offsets + more
    entering[:, rows] += onto
    if cotangent.shape[1] > written.shape[1]:
        entering[:, 1:] += cotangent[:, 1:]
    return entering, bias


#: Steps in a row with what entered each.
Chain = list[tuple[Step, Tensor]]


def _chain(steps: Sequence[Step], x: Tensor) -> Chain:
    """Steps with what enters each; what the last returns is not computed."""
    found = []
    for i, step in enumerate(steps):
        read = step.read()
        found.append((read, x))
        x = read(x) if i + 1 < len(steps) else x
    return found


def _constant(steps: Sequence[Step], like: Tensor) -> Chain:
    """Steps whose derivative does not depend on what enters them."""
    return [(step.read(), like) for step in steps]


def _back(chain: Chain, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents (B×Q×K×·) carried back, and Σ bias · cotangent over the steps: B×K."""
    bias = cotangent.new_zeros(len(cotangent), cotangent.shape[2])
    for step, x in reversed(chain):
        offset = step.offset()
        if offset is not None:
            bias = bias + (cotangent @ offset.to(cotangent.dtype)).sum(1)
        cotangent = step.at(x, frozen=True).vjp(cotangent)
    return cotangent, bias


def _added(attention: Attention, call: Call, rows: slice) -> Tensor:
    """What an attention module adds to the residual stream at the rows."""
    output = upcast(attention.output(call, rows))
    return OutputPath.of([step.read() for step in attention.outer], output).output


def _output_chain(attention: Attention, call: Call, like: Tensor, rows: slice) -> Chain:
    """From A·V to the residual stream, whose rows are ``like`` these."""
    inner = attention.inner(call, rows)
    if all(step.uniform for step in inner):
        chain = _constant((*inner, attention.proj), like)
    else:
        chain = _chain((*inner, attention.proj), upcast(attention.mixed(call, rows)))
    if all(step.uniform for step in attention.outer):
        return chain + _constant(attention.outer, like)
    return chain + _chain(attention.outer, upcast(attention.output(call, rows)))


def _mlp_chain(
    mlp: MLP, hidden: list[tuple[Tensor, int]], output: Tensor, middle: Tensor, rows: slice
) -> Chain:
    """From the residual stream through an MLP and back to it."""
    assert mlp.hidden is not None
    first: Any = mlp.hidden[0].read()
    # An activation may have written over what entered it.
    if hidden and all(_version(tensor) == version for tensor, version in hidden):
        entered = upcast(first.gathered([tensor for tensor, _ in hidden])[:, rows])
    else:
        entered = _chain((*mlp.entry, first, first), middle)[-1][1]
    chain = [*_chain(mlp.entry, middle), (first, middle)]
    chain += _chain((*mlp.hidden[1:], mlp.proj), entered)
    if all(step.uniform for step in mlp.outer):
        return chain + _constant(mlp.outer, middle)
    return chain + _chain(mlp.outer, upcast(mlp.output(None, output[:, rows])))


def _through_values(
    attention: Attention, call: Call, x: Tensor, rows: slice, z: Tensor
) -> tuple[Tensor, Tensor]:
    """From cotangents of A·V (B×Q×K×(H·d)) to those of the tokens, with A constant.

    Returns:
        B×N×K×D and what the biases of the values and before them add, B×K.
    """
    weights = attention.weights(call, rows).to(z.dtype)
    heads, count = weights.shape[1], z.shape[2]
    by_head = z.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4).flatten(3)
    of_values = (weights.mT @ by_head).unflatten(-1, (count, -1)).permute(0, 2, 3, 1, 4)
    projections = [step.read() for step in attention.projections or ()]
    width = (sum(step.weight.shape[0] for step in projections) - z.shape[-1]) // 2
    if width < z.shape[-1]:
        # Heads that share a value add up.
        of_values = of_values.unflatten(3, (width * heads // z.shape[-1], -1)).sum(4)
    c = of_values.flatten(3)
    weight, offset = projections[-1].weight[-width:], projections[-1].offset()
    bias = c.new_zeros(len(c), count)
    if offset is not None:
        bias = (c @ offset[-width:].to(c.dtype)).sum(1)
    back, before_values = _back(_chain(attention.entry, x), c @ weight)
    return back, bias + before_values
