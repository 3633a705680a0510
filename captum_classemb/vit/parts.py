"""What an adapter says of a model: its blocks, their attention and MLP, and its readout.

Everything the library computes is written in these terms. An adapter for a new family of models
subclasses :class:`Attention` for its attention module and returns a :class:`ViT`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.attention import attention_weights
from captum_classemb.functional.precision import upcast
from captum_classemb.readout import Linear, OutputPath, Step
from captum_classemb.vit.active_edits import table_cuts

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Call",
    "split_heads",
    "uncompiled",
]


@dataclass
class Call:
    """One call of a module during the recorded forward pass.

    Attributes:
        args, kwargs: what the module was called with.
        output: what it returned.
        inner: outputs of the submodules an adapter watches, by module.
        entered: first inputs of these submodules.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    inner: dict[nn.Module, Tensor] = field(default_factory=dict)
    entered: dict[nn.Module, Tensor] = field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        """The first argument: the tokens."""
        return self.argument(0)

    def argument(self, index: int) -> Tensor:
        """One argument, counting positional ones first."""
        tensor: Tensor = (*self.args, *self.kwargs.values())[index]
        return tensor


class Attention(ABC):
    """One self-attention module, read as a memory.

    Args:
        module: called with the tokens; hooks are set on it.
        heads: H.
        proj: the output projection W_O.
        outer: the steps between the module's output and the residual stream (LayerScale,
            post-norm).
        watch: submodules whose inputs and outputs :meth:`values` and its siblings need.

    What follows may be set to say how queries, keys and values are made of the stream's rows.
    :class:`~captum_classemb.attr.PatchImportance` then follows derivatives along the rows that
    are read; without it, the branches of later blocks are held constant.
    :class:`~captum_classemb.attr.AllPathImportance` needs ``projections`` and, where there is one,
    ``entry``, and refuses a model without them.

    Attributes:
        entry: the steps between the residual stream and the projections (a norm).
        projections: the linear steps whose outputs, side by side, are queries, keys and values;
            None if they are not known.
        query_steps, key_steps: the steps after them (norms of each head).
        gate: the linear step whose sigmoid is the gate among :meth:`inner`, where there is one.
    """

    entry: tuple[Step, ...] = ()
    projections: tuple[Linear, ...] | None = None
    query_steps: tuple[Step, ...] = ()
    key_steps: tuple[Step, ...] = ()
    gate: Linear | None = None

    #: True where :meth:`weights` are one softmax that the module itself may show.
    shows_weights: bool = False

    def __init__(
        self,
        module: nn.Module,
        heads: int,
        proj: nn.Module,
        outer: Sequence[Step] = (),
        watch: Sequence[nn.Module] = (),
    ) -> None:
        self.module = module
        self.heads = heads
        self.proj = Linear(proj)
        self.outer = tuple(outer)
        self.watch = tuple(watch)

    @abstractmethod
    def values(self, call: Call) -> Tensor:
        """The vectors v that attention averages: B×H×N×d."""

    @abstractmethod
    def queries(self, call: Call, rows: slice) -> Tensor:
        """The query vectors of some rows as they enter the dot product: B×H×Q×d."""

    @abstractmethod
    def keys(self, call: Call) -> Tensor:
        """The key vectors as they enter the dot product: B×H×N×d."""

    def scale(self) -> float:
        """The factor of the dot products."""
        return float(self.module.scale)  # type: ignore[arg-type]

    def bias(self, call: Call, rows: slice) -> Tensor | None:
        """What is added before the softmax, broadcastable to B×H×Q×N."""
        return None

    def bias_left(self, call: Call, rows: slice) -> Tensor | None:
        """:meth:`bias` of the tokens that an edit of this pass left."""
        cuts = table_cuts()
        bias = self.bias(call, slice(None) if cuts else rows)
        if bias is None or not cuts:
            return bias
        for cut in cuts:
            bias = cut(bias)
        return bias[..., rows, :] if bias.shape[-2] > 1 else bias

    def weights(self, call: Call, rows: slice) -> Tensor:
        """What multiplies the values at some query rows: B×H×Q×N."""
        return attention_weights(
            self.queries(call, rows), self.keys(call), self.scale(), self.bias_left(call, rows)
        )

    def plain_softmax(self, call: Call, rows: slice) -> bool:
        """Whether :meth:`weights` are softmax(scale · query·key) and no more in this call."""
        return type(self).weights is Attention.weights and self.bias(call, rows) is None

    def mixed(self, call: Call, rows: slice) -> Tensor:
        """A·V at some query rows, heads side by side: B×Q×(H·d)."""
        mixed = self.weights(call, rows) @ upcast(self.values(call))
        return mixed.transpose(1, 2).flatten(2)

    def inner(self, call: Call, rows: slice) -> tuple[Step, ...]:
        """The steps between A·V and W_O at some query rows: norms and gates."""
        return ()

    def output(self, call: Call, rows: slice) -> Tensor:
        """What W_O returns, before :attr:`outer`: B×Q×D."""
        output: Tensor = call.output[0] if isinstance(call.output, tuple) else call.output
        return output[:, rows]

    def coefficients(self, call: Call, rows: slice) -> Tensor:
        """The memory coefficients, which are what enters W_O: B×Q×M.

        Raises:
            UnsupportedModelError: if W_O is not called as a module.
        """
        entered = call.entered.get(self.proj.module)
        if entered is None:
            raise UnsupportedModelError(
                f"{type(self.module).__qualname__} does not call its output projection as a "
                "module, so its memory coefficients cannot be recorded."
            )
        return entered[:, rows]

    def path(self, call: Call, rows: slice) -> OutputPath:
        """The way from A·V to the residual stream, at some query rows."""
        steps = tuple(step.read() for step in (*self.inner(call, rows), self.proj, *self.outer))
        count = len(steps) - len(self.outer) - 1
        # Only what a step with a derivative of its own reads is computed.
        read = max((i + 1 for i, step in enumerate(steps[:count]) if not step.uniform), default=0)
        inner = OutputPath.of(steps[: read - 1], self.mixed(call, rows)) if read else None
        inputs = [] if inner is None else [*inner.inputs, inner.output]
        inputs += [torch.empty(0)] * (count + 1 - read)
        output = self.output(call, rows)
        # A few rows are copied so that the whole output need not be kept.
        output = output if output.shape[1] == call.input.shape[1] else output.clone()
        outer = OutputPath.of(steps[count + 1 :], output)
        return OutputPath(steps, (*inputs, *outer.inputs), outer.output)


class MLP:
    """One MLP, read as a memory: what enters ``fc2`` holds the coefficients.

    Args:
        module: its output is what ``fc2`` returns.
        fc2: the last linear layer; its columns are the value vectors.
        outer: the steps between the module's output and the residual stream.
        columns: the columns that belong to the MLP, where ``fc2`` is shared with attention; its
            bias is then attention's.
        entry: the steps between the residual stream and the module (a norm).
        hidden: the steps from there to what enters ``fc2``; None if they are not known.
    """

    def __init__(
        self,
        module: nn.Module,
        fc2: nn.Module,
        outer: Sequence[Step] = (),
        columns: slice | None = None,
        entry: Sequence[Step] = (),
        hidden: Sequence[Step] | None = None,
    ) -> None:
        self.module = module
        self.fc2 = fc2
        self.entry = tuple(entry)
        self.hidden = None if hidden is None else tuple(hidden)
        self.outer = tuple(outer)
        self.proj = Linear(fc2, columns, biased=columns is None)

    def coefficients(self, entered: Tensor) -> Tensor:
        """The memory coefficients among what enters ``fc2``: B×Q×M."""
        columns = self.proj.columns
        return entered if columns is None else entered[..., columns]

    def output(self, entered: Tensor | None, output: Tensor) -> Tensor:
        """What the MLP writes, before :attr:`outer`: B×Q×D."""
        if self.proj.columns is None:
            return output
        assert entered is not None
        return self.proj(self.coefficients(entered))

    def path(self, projected: Tensor) -> OutputPath:
        """The way from the coefficients to the residual stream, at rows of fc2's output."""
        steps = tuple(step.read() for step in (self.proj, *self.outer))
        outer = OutputPath.of(steps[1:], projected)
        return OutputPath(steps, (torch.empty(0), *outer.inputs), outer.output)


@dataclass
class Block:
    """One transformer block: the residual stream enters and leaves through ``module``.

    Attributes:
        module: takes ``resid_pre`` and returns ``resid_post``.
        attentions: the attention modules, run side by side (almost always one).
        mlps: the MLPs, run side by side.
        parallel: True if attention and MLP read the same input, so that there is no ``resid_mid``.
        stream: which argument of the module is ``resid_pre``.
    """

    module: nn.Module
    attentions: tuple[Attention, ...]
    mlps: tuple[MLP, ...]
    parallel: bool = False
    stream: int = 0


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, which computes the same."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """B×N×(H·d) to B×H×N×d."""
    batch, count, width = tokens.shape
    return tokens.view(batch, count, heads, width // heads).transpose(1, 2)
