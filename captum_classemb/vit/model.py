"""A Vision Transformer that the library can read, whichever library built it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.grid import patch_index
from captum_classemb.functional.precision import refuse_non_finite
from captum_classemb.readout import Readout
from captum_classemb.readout.features import Features
from captum_classemb.vit.parts import Block

__all__ = ["ViT", "logits_of", "whole_patches"]

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
