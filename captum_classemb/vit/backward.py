"""A forward and a backward pass that show how the logit of a class depends on attention.

Fused attention stays on: ∂logit/∂A = (∂logit/∂(A·V))·Vᵀ, with A from queries and keys, so only what
each attention module returns needs a derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.hooks import after, before, hooks_removed, keep_output
from captum_classemb.readout import OutputPath
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import Attention, Block, Call
from captum_classemb.vit.record import ALL

__all__ = ["AttentionTape", "attention_gradients", "watched"]


@dataclass
class AttentionTape:
    """The one attention module of each block, as it was called in a pass with gradients.

    Attributes:
        attentions: the modules.
        calls: their calls.
        entering: the tokens that entered the first block, B×N×D, where the graph starts.
        resid_post: what each block returned, B×N×D, with its graph.
    """

    attentions: list[Attention]
    calls: list[Call] = field(default_factory=list)
    entering: Tensor | None = None
    resid_post: list[Tensor] = field(default_factory=list)

    def weights(self, block: int) -> Tensor:
        """A, B×H×N×N, without gradients."""
        with torch.no_grad():
            return self.attentions[block].weights(self.calls[block], ALL)

    def values(self, block: int) -> Tensor:
        """The value vectors v, B×H×N×d, without gradients."""
        return upcast(self.attentions[block].values(self.calls[block]).detach())

    def output(self, block: int) -> Tensor:
        """What the module returned, B×N×D, with its graph."""
        output = self.calls[block].output
        tokens: Tensor = output[0] if isinstance(output, tuple) else output
        return tokens

    def gradient(self, block: int, of_output: Tensor) -> Tensor:
        """∂/∂A (B×H×N×N) from the derivative with respect to what the module returned."""
        attention, call = self.attentions[block], self.calls[block]
        with torch.no_grad():
            values = self.values(block)
            inner = attention.inner(call, ALL)
            z = upcast(of_output)[:, :, None] @ attention.proj.weight
            if inner:
                mixed = (self.weights(block) @ values).transpose(1, 2).flatten(2)
                z = OutputPath.of(inner, mixed).vjp(z)
            z = z[:, :, 0]
            by_head: Tensor = z.unflatten(-1, (values.shape[1], -1)).transpose(1, 2)
            return by_head @ values.transpose(-2, -1)


@contextmanager
def watched(vit: ViT) -> Iterator[AttentionTape]:
    """Within the context, a forward pass with gradients writes the tape.

    The graph starts at the first block, whatever the model's parameters require.

    Raises:
        UnsupportedModelError: if a block has several attention modules, or attention is no module
            apart from its block.
    """
    tape = AttentionTape([_only_attention(vit, block) for block in vit.blocks])

    def start(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tape.calls.clear()
        tape.resid_post.clear()
        tape.entering = leaf = Call(args, kwargs).argument(0).detach().requires_grad_(True)
        if args:
            return (leaf, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): leaf}

    def leave(args: Any, kwargs: Any, output: Any) -> None:
        tape.resid_post.append(output[0] if isinstance(output, tuple) else output)

    handles = [before(vit.blocks[0].module, start)]
    handles += [after(block.module, leave) for block in vit.blocks]
    for attention in tape.attentions:
        inner: dict[nn.Module, Tensor] = {}

        def end(
            args: Any, kwargs: Any, output: Any, inner: dict[nn.Module, Tensor] = inner
        ) -> None:
            tape.calls.append(Call(args, kwargs, output, inner))

        handles += [keep_output(module, inner) for module in attention.watch]
        handles.append(after(attention.module, end))
    with hooks_removed(handles), torch.enable_grad():
        yield tape


def attention_gradients(
    vit: ViT,
    inputs: Tensor,
    cotangent: Callable[[Tensor], Tensor],
    forward_args: tuple[Any, ...] = (),
) -> list[tuple[Tensor, Tensor]]:
    """A and ∂logit/∂A of every block, by one forward and one backward pass.

    Args:
        vit: an adapted model.
        inputs: images, B×3×H×W.
        cotangent: ∂logit/∂ of the last block's tokens, given these, B×N×D both.
        forward_args: further arguments of the model.

    Returns:
        for each block A and its derivative, B×H×N×N both.

    Raises:
        UnsupportedModelError: if a block has several attention modules, or attention is no module
            apart from its block.
    """
    with watched(vit) as tape:
        vit(inputs, *forward_args)
        final, depth = tape.resid_post[-1], range(len(vit.blocks))
        outputs = [tape.output(block) for block in depth]
        gradients = torch.autograd.grad(final, outputs, cotangent(final))
    return [(tape.weights(b), tape.gradient(b, gradients[b])) for b in depth]


def _only_attention(vit: ViT, block: Block) -> Attention:
    if len(block.attentions) != 1 or block.attentions[0].module is block.module:
        raise UnsupportedModelError(
            f"{type(vit.model).__qualname__} has blocks of type "
            f"{type(block.module).__qualname__}: derivatives of attention need blocks with one "
            "attention module."
        )
    return block.attentions[0]
