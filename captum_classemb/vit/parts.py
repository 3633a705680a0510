"""What an adapter says of a model: its blocks, their attention and MLP, and its readout.

Everything the library computes is written in these terms. An adapter for a new family of models
subclasses :class:`Attention` for its attention module and returns a :class:`ViT`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.attention import attention_weights
from captum_classemb.functional.grid import patch_index
from captum_classemb.functional.precision import refuse_non_finite, upcast
from captum_classemb.readout import Linear, OutputPath, Readout, Step
from captum_classemb.readout.features import Features
from captum_classemb.vit.active_edits import table_cuts

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Call",
    "ViT",
    "logits_of",
    "split_heads",
    "uncompiled",
    "whole_patches",
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


def logits_of(output: Any, model: str) -> Tensor:
    """The one tensor of logits or features of an image among what a model returned.

    Raises:
        UnsupportedModelError: if there is none, or several and none is named ``logits``.
    """
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if isinstance(output, Tensor):
            break
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        output = named if isinstance(named, Tensor) else output
    if isinstance(output, (tuple, list, Mapping)):
        each = list(output.values()) if isinstance(output, Mapping) else output
        found = [one for one in each if isinstance(one, Tensor) and one.dim() == 2]
        output = found[0] if len(found) == 1 else output
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"{model} returned {type(output).__qualname__}, not a tensor of logits: return the "
            "logits alone, or under the name 'logits'."
        )
    # One logit an image, squeezed.
    return output[:, None] if output.dim() == 1 else output


def whole_patches(patch: tuple[int, int], image: tuple[int, int]) -> tuple[int, int]:
    """The grid of an image whose last pixels are left out where they fill no patch."""
    return image[0] // patch[0], image[1] // patch[1]


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, which computes the same."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """B×N×(H·d) to B×H×N×d."""
    batch, count, width = tokens.shape
    return tokens.view(batch, count, heads, width // heads).transpose(1, 2)


#: What an adapter says of a model.
_FACTS = (
    "blocks",
    "_own_readout",
    "prefix_tokens",
    "patch_size",
    "image_size",
    "channels",
    "_grid",
    "resized_to",
    "call",
    "features",
    "_pixels_of",
)


class ViT(nn.Module):
    """A Vision Transformer that the library can read; called, it returns the model's logits.

    Args:
        model: the user's model. It is never changed.
        blocks: the blocks whose attention has the readout's query among its rows.
        readout: the model's own class embedding, or None if it has no classifier.
        prefix_tokens: P, the tokens before the patch grid.
        patch_size: height and width of a patch in pixels.
        image_size: the only image size the model takes, or None if it takes any.
        channels: the number of image channels.
        grid: the patch grid of an image size; by default as many patches as cover it.
        features: what a head reads of the last tokens, where it is known.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        readout: Readout | None,
        prefix_tokens: int,
        patch_size: tuple[int, int],
        image_size: tuple[int, int] | None,
        channels: int = 3,
        grid: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
        features: Features | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.blocks = tuple(blocks)
        # In a tuple, so that the readout's modules are not registered a second time.
        self._own_readout = (readout,)
        self.prefix_tokens = prefix_tokens
        self.patch_size = patch_size
        self.image_size = image_size
        self.channels = channels
        self._grid = grid
        self.features = features
        #: The adapter that read the model, called again where its modules change.
        self.adapter: Callable[[nn.Module], ViT] | None = None
        #: States of structure and weights for which the reading of the model was verified.
        self.verified: set[Any] = set()
        #: Whether a layer is quantised, whose activations are rounded to eight bits.
        self.quantised = False
        #: The size that images are resized to by preprocessing in front of the model, if any.
        self.resized_to: tuple[int, int] | None = None
        #: How the model is called, where its own forward needs more than images.
        self.call: Callable[..., Any] | None = None
        # In a tuple, so that it is not registered a second time.
        self._pixels_of: tuple[nn.Module | None] = (model,)
        self.training = model.training

    def read_again(self) -> None:
        """Take every fact about the model from its layers as they are now."""
        if self.adapter is None:
            return
        fresh = self.adapter(self.model)
        for name in _FACTS:
            self.__dict__[name] = fresh.__dict__[name]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # Captum has no other way to hand on keyword arguments.
        if len(args) > 1 and isinstance(args[-1], Mapping):
            args, kwargs = args[:-1], {**args[-1], **kwargs}
        output = (self.model if self.call is None else self.call)(*args, **kwargs)
        return logits_of(output, type(self.model).__qualname__)

    @property
    def readout(self) -> Readout:
        """The model's own class embedding.

        Raises:
            UnsupportedModelError: if the model has no classifier.
        """
        readout = self._own_readout[0]
        if readout is None:
            raise UnsupportedModelError(
                f"{type(self.model).__qualname__} has no classifier (num_classes=0): "
                "give a readout=, or a model with a classification head."
            )
        return readout

    def read_with(self, readout: nn.Module | None) -> Readout | None:
        """A readout as it is given, or what any small module makes of the pooled tokens.

        Args:
            readout: a readout; None; or a module, which reads what the model's own head reads: a
                first linear layer of width D the pooled tokens, one of width 2D CLS beside the
                mean patch.

        Raises:
            InputError: if it is neither, or of another width.
            UnsupportedModelError: if it is not known what a head reads.
        """
        if readout is None or isinstance(readout, Readout):
            return readout
        if not isinstance(readout, nn.Module):
            raise InputError(
                f"readout is a {type(readout).__qualname__}: a Readout or a module that reads the "
                "pooled tokens is needed."
            )
        if self.features is None:
            raise UnsupportedModelError(
                f"it is not known what a head of {type(self.model).__qualname__} reads: give a "
                "Readout of captum_classemb.readout instead of a module."
            )
        return self.features.read_by(readout)

    @property
    def pixels_of(self) -> nn.Module | None:
        """The model whose images these are: one inside, where they reach it unchanged, or None."""
        return self._pixels_of[0]

    @property
    def has_readout(self) -> bool:
        """Whether the model has a classifier of its own."""
        return self._own_readout[0] is not None

    @property
    def num_classes(self) -> int:
        """C of the model's own classifier."""
        return self.readout.num_classes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def block(self, index: int) -> Block:
        """One block, counted from the end if negative.

        Raises:
            InputError: if there is none.
        """
        count = len(self.blocks)
        if not -count <= index < count:
            raise InputError(f"block {index} is out of range: the model has {count}.")
        return self.blocks[index]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The patch grid h×w for an image of H×W pixels."""
        if self._grid is not None:
            return self._grid(image_size)
        (height, width), (p, q) = image_size, self.patch_size
        return -(-height // p), -(-width // q)

    def patch_pixels(self, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of a patch in an image of this size; None if patches share it evenly."""
        if self.resized_to in (None, image_size):
            return self.patch_size
        return None

    def feature_mask(self, image_size: tuple[int, int]) -> Tensor:
        """The patch of each pixel, as Captum's ``feature_mask``: 1×1×H×W, int64.

        Examples:
            >>> from captum_classemb.models import demo_vit
            >>> from captum_classemb.vit import adapt
            >>> adapt(demo_vit()).feature_mask((64, 64)).unique().numel()
            64
        """
        patch = self.patch_pixels(image_size)
        index = patch_index(image_size, self.grid(image_size), patch)
        return index[None, None]

    def check_inputs(
        self, inputs: Tensor, finite: bool = True, forward_args: tuple[Any, ...] = ()
    ) -> None:
        """Raise InputError unless ``inputs`` is a batch of images that the model takes.

        Hugging Face's models take any size where ``interpolate_pos_encoding`` is among the further
        arguments.
        """
        if inputs.dim() != 4:
            raise InputError(
                f"inputs have shape {tuple(inputs.shape)}: a batch of images "
                "B×channels×height×width is needed."
            )
        if inputs.shape[1] != self.channels:
            raise InputError(
                f"inputs have {inputs.shape[1]} channels: the model takes {self.channels}."
            )
        size = (inputs.shape[2], inputs.shape[3])
        named = forward_args[-1] if forward_args else None
        named = named.get("interpolate_pos_encoding") if isinstance(named, Mapping) else False
        any_size = named is True or any(argument is True for argument in forward_args)
        if not any_size and self.image_size is not None and size != self.image_size:
            wanted = f"{self.image_size[0]}×{self.image_size[1]}"
            raise InputError(f"inputs are {size[0]}×{size[1]} pixels: the model takes {wanted}.")
        self.grid(size)
        if finite:
            refuse_non_finite(inputs)
