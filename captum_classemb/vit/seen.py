"""One call of a model that holds a Vision Transformer: what followed its last block."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.hooks import after, before, hooks_removed
from captum_classemb.vit.model import ViT, logits_of
from captum_classemb.vit.parts import Call

__all__ = ["Event", "NotCalledError", "Trace", "called", "refusal", "with_another_size"]

_SIDES = (224, 256, 64, 32, 384, 512)


class NotCalledError(UnsupportedModelError):
    """The model takes none of the images that it was called with."""


@dataclass
class Event:
    """One module called after the last block."""

    module: nn.Module
    entered: Tensor
    left: Tensor


@dataclass
class Trace:
    """One call of the model.

    Attributes:
        size: of the images given.
        received: size of the images that the Vision Transformer was called with.
        unchanged: whether they were the images given.
        tokens: what its last block returned, B×N×D.
        events: the modules that were called after it, in the order they returned.
        inner: what the Vision Transformer returned, if a tensor.
        output: what the model returned.
    """

    size: tuple[int, int]
    channels: int
    received: tuple[int, int]
    unchanged: bool
    tokens: Tensor
    events: list[Event]
    inner: Tensor | None
    output: Tensor


def refusal(model: nn.Module, path: str, inner: ViT, why: str) -> str:
    """A sentence that says why a model is not read, and what to pass instead."""
    pass_it = f"pass `model.{path}`"
    if not inner.has_readout:
        pass_it += " and `readout=`, a module that reads its pooled tokens"
    return (
        f"what {type(model).__qualname__} returns {why} of the pooled tokens of its "
        f"{type(inner.model).__qualname__}: {pass_it}."
    )


def _images(inner: ViT, side: tuple[int, int], channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, channels, *side, generator=generator)
    return pixels.to(inner.device, inner.dtype)


def called(model: nn.Module, path: str, inner: ViT) -> Trace:
    """The model called with images of a size and channels that it takes."""
    p, q = inner.patch_size
    height, width = inner.image_size or (4 * p, 4 * q)
    sides = [(height, width), (height // 2, width // 2), (2 * height, 2 * width)]
    sides += [(side, side) for side in _SIDES]
    # Learnt positions, a row each, tell the number of patches of a model of fixed size.
    rows = {t.shape[-2] for t in (*model.parameters(), *model.buffers()) if t.dim() > 1}
    grids = sorted({math.isqrt(n - prefix) for n in rows for prefix in (0, 1, 2) if n > prefix})
    known = {n - prefix for n in rows for prefix in range(3)}
    sides += [(g * p, g * q) for g in grids if g * g in known]
    first: Exception | None = None
    for side in sides:
        for channels in dict.fromkeys((3, inner.channels, 1)):
            try:
                return _trace(model, inner, _images(inner, side, channels))
            except UnsupportedModelError:
                raise
            except Exception as error:  # whatever the user's own code raises
                first = first or error
    said = str(first).split("\n")[0]
    raise NotCalledError(
        refusal(
            model,
            path,
            inner,
            f"cannot be seen ({type(first).__name__}: {said}), so not what it makes",
        )
    )


def _trace(model: nn.Module, inner: ViT, pixels: Tensor) -> Trace:
    inside = {m for block in inner.blocks for m in block.module.modules()}
    last = inner.blocks[-1].module
    tokens: list[Tensor] = []
    received: list[tuple[int, int]] = []
    unchanged: list[bool] = []
    returned: list[Tensor] = []
    entered: dict[nn.Module, list[Tensor]] = {}
    events: list[Event] = []

    def block_left(args: Any, kwargs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        tokens.append(output.clone())

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = _tensor((*args, *kwargs.values()))
        if tokens and given is not None:
            entered.setdefault(module, []).append(given.clone())

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        left = _tensor(output)
        if left is not None and entered.get(module):
            events.append(Event(module, entered[module].pop(), left.clone()))

    def inner_entered(args: Any, kwargs: Any) -> None:
        given = Call(args, kwargs).input
        if given.dim() == 4:
            received.append(_size(args, kwargs))
            unchanged.append(given.shape == pixels.shape and torch.equal(given, pixels))

    def inner_left(args: Any, kwargs: Any, output: Any) -> None:
        with suppress(UnsupportedModelError):
            returned.append(logits_of(output, "").clone())

    handles = [
        after(last, block_left),
        before(inner.model, inner_entered),
        after(inner.model, inner_left),
    ]
    for module in model.modules():
        if module not in inside:
            handles += [
                before(module, partial(enter, module)),
                after(module, partial(leave, module)),
            ]
    with hooks_removed(handles), torch.no_grad():
        output = logits_of(model(pixels), type(model).__qualname__)
    if len(tokens) != 1:
        raise UnsupportedModelError(
            f"{type(model).__qualname__} calls its {type(inner.model).__qualname__} {len(tokens)} "
            "times for one batch of images: models that call it once are read."
        )
    size = (pixels.shape[2], pixels.shape[3])
    return Trace(
        size,
        pixels.shape[1],
        received[0] if received else size,
        all(unchanged),
        tokens[0],
        events,
        returned[0] if returned else None,
        output,
    )


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    for name in ("last_hidden_state", "logits"):
        output = output if isinstance(output, Tensor) else getattr(output, name, output)
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def with_another_size(
    model: nn.Module, inner: ViT, trace: Trace
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Another size of images, and what size reaches the Vision Transformer; None if it fails."""
    side = (trace.size[0] + 2 * inner.patch_size[0], trace.size[1])
    received: list[tuple[int, int]] = []

    def enter(args: Any, kwargs: Any) -> None:
        # An encoder takes tokens: nothing was resized on the way to it.
        received.append(_size(args, kwargs) if Call(args, kwargs).input.dim() == 4 else side)

    with hooks_removed([before(inner.model, enter)]), suppress(Exception), torch.no_grad():
        model(_images(inner, side, trace.channels))
        return side, received[0]
    return side, None


def _size(args: Any, kwargs: Any) -> tuple[int, int]:
    given = Call(args, kwargs).input
    return given.shape[-2], given.shape[-1]
