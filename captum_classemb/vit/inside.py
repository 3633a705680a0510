"""A Vision Transformer inside a model: what becomes of its last tokens is found by one call.

A model is read if exactly one of its submodules can be adapted, and the modules called after its
last block, one on the output of the other, lead from a pool of its last tokens to what the model
returns. The pool is the class token, the mean of the patches, the mean of all tokens, or the class
token beside the mean of the patches, of tokens with or without a norm of their own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import ClassEmbWarning, UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.hooks import after, before, hooks_removed
from captum_classemb.readout import AttentionPooled, Norm, Readout
from captum_classemb.readout.features import Features, layers_of
from captum_classemb.vit.parts import Call, ViT, logits_of
from captum_classemb.vit.transformer_encoder import encoders_of
from captum_classemb.vit.verify import refuse_random_forward

__all__ = ["read_encoder", "read_inside"]

_SCORES = (nn.Softmax, nn.Sigmoid, nn.LogSoftmax, nn.LogSigmoid)
_FUNCTIONS = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh())
_PREFIX = 16
_SIDES = (224, 256, 64, 32, 384, 512)


class _NotCalledError(UnsupportedModelError):
    """The model takes none of the images that it was called with."""


@dataclass
class _Event:
    """One module called after the last block."""

    module: nn.Module
    entered: Tensor
    left: Tensor


@dataclass
class _Trace:
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
    events: list[_Event]
    inner: Tensor | None
    output: Tensor


def read_inside(model: nn.Module, path: str, inner: ViT) -> ViT:
    """The model around an adapted Vision Transformer, with the readout that it makes of it.

    Args:
        model: calls the Vision Transformer once.
        path: the name of the Vision Transformer in it, for messages.
        inner: the Vision Transformer, adapted.

    Raises:
        InputError: if something random is active in train mode.
        UnsupportedModelError: if what the model makes of the last tokens is not found.
    """
    refuse_random_forward(model)
    return _read(model, path, inner, _called(model, path, inner))


def read_encoder(model: nn.Module, path: str, encoder: nn.Module) -> ViT:
    """The model around an ``nn.TransformerEncoder``.

    Patches, prefix tokens and the size of images are found by what the model takes, and verified
    with the rest of the reading.

    Args:
        model: calls the encoder once.
        path: the name of the encoder in it, for messages.
        encoder: the encoder.

    Raises:
        InputError: if something random is active in train mode.
        UnsupportedModelError: if the layers are not supported, or patches or what the model makes
            of the last tokens are not found.
    """
    refuse_random_forward(model)
    for inner in encoders_of(model, encoder):
        with suppress(_NotCalledError):
            trace = _called(model, path, inner)
            h, w = inner.grid(trace.size)
            inner.prefix_tokens = trace.tokens.shape[1] - h * w
            inner.image_size = trace.size
            if 0 <= inner.prefix_tokens <= _PREFIX:
                return _read(model, path, inner, trace)
    raise UnsupportedModelError(
        f"{type(model).__qualname__} holds an nn.TransformerEncoder, but no layer that makes one "
        "token of each patch was found before it: register_adapter can say how it is built."
    )


def _read(model: nn.Module, path: str, inner: ViT, trace: _Trace) -> ViT:
    found = _readout(trace, inner)
    if found is None:
        raise UnsupportedModelError(_refusal(model, path, inner, "is not made by modules alone"))
    readout, features, last = found
    fixed = trace.received if trace.received != trace.size else None
    image_size = inner.image_size
    if fixed is None and image_size is not None:
        given, received = _with_another_size(model, inner, trace)
        image_size = image_size if received is None else None
        fixed = received if received != given else None
    vit = ViT(
        model,
        inner.blocks,
        readout,
        inner.prefix_tokens,
        inner.patch_size,
        None if fixed else image_size,
        trace.channels,
        inner.grid if fixed is None else partial(_fixed_grid, inner, fixed),
        features,
    )
    vit.resized_to = fixed
    vit._pixels_of = (inner.pixels_of if trace.unchanged else None,)
    if last is not None:
        vit.call = partial(_output_of, model, last)
    return vit


def _fixed_grid(inner: ViT, fixed: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    return inner.grid(fixed)


def _output_of(model: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What a module of the model returned in its call."""
    left: list[Any] = []
    with hooks_removed([after(module, lambda args, kwargs, output: left.append(output))]):
        model(*args, **kwargs)
    return logits_of(left[-1], type(module).__qualname__)


def _refusal(model: nn.Module, path: str, inner: ViT, why: str) -> str:
    pass_it = f"pass `model.{path}`"
    if not inner.has_readout:
        pass_it += " and `readout=`, a module that reads its pooled tokens"
    return (
        f"what {type(model).__qualname__} returns {why} of the pooled tokens of its "
        f"{type(inner.model).__qualname__}: {pass_it}."
    )


# -- One call


def _images(inner: ViT, side: tuple[int, int], channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, channels, *side, generator=generator)
    return pixels.to(inner.device, inner.dtype)


def _called(model: nn.Module, path: str, inner: ViT) -> _Trace:
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
    raise _NotCalledError(
        _refusal(
            model,
            path,
            inner,
            f"cannot be seen ({type(first).__name__}: {said}), so not what it makes",
        )
    )


def _trace(model: nn.Module, inner: ViT, pixels: Tensor) -> _Trace:
    inside = {m for block in inner.blocks for m in block.module.modules()}
    last = inner.blocks[-1].module
    tokens: list[Tensor] = []
    received: list[tuple[int, int]] = []
    unchanged: list[bool] = []
    returned: list[Tensor] = []
    entered: dict[nn.Module, list[Tensor]] = {}
    events: list[_Event] = []

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
            events.append(_Event(module, entered[module].pop(), left.clone()))

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
    return _Trace(
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


def _with_another_size(
    model: nn.Module, inner: ViT, trace: _Trace
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


# -- From the output back to the pool


_Found = tuple[Readout | None, Features | None, nn.Module | None]


def _readout(trace: _Trace, inner: ViT) -> _Found | None:
    """The readout, what it reads, and the module whose output is explained if not the model's."""
    if trace.inner is not None and _same(trace.inner, trace.output):
        own = inner.readout if inner.has_readout else None
        return own, inner.features, None
    for scores, output in _before_scores(trace):
        if scores and trace.inner is not None and _same(trace.inner, output) and inner.has_readout:
            return inner.readout, inner.features, _said(inner.model)
        found = _back(trace, inner, output, len(trace.events))
        if found is None:
            continue
        features, modules = found
        while modules and isinstance(modules[-1], _SCORES):
            scores = bool(modules.pop()) or True
        layers = list(layers_of(modules))
        if scores and not layers:
            continue
        last = _said(layers[-1]) if scores else None
        if not any(_classifies(layer) for layer in layers):
            norm = Norm(layers[0]) if layers else None
            return None, replace(features, pooled_norm=norm or features.pooled_norm), last
        return features.read_by(*layers), features, last
    return None


def _classifies(layer: nn.Module) -> bool:
    try:
        Norm(layer)
    except UnsupportedModelError:
        return not isinstance(layer, nn.BatchNorm1d)
    return False


def _said(module: nn.Module) -> nn.Module:
    said = "the model returns probabilities: the logits before them are explained."
    warnings.warn(said, ClassEmbWarning, stacklevel=2)
    return module


def _before_scores(trace: _Trace) -> Iterator[tuple[bool, Tensor]]:
    """The output, and what it is a softmax or a sigmoid of, if of anything."""
    yield False, trace.output
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.softmax(-1),
        torch.sigmoid,
        lambda x: x.log_softmax(-1),
    )
    for event in reversed(trace.events):
        alike = event.left.shape == trace.output.shape
        if alike and any(_same(f(upcast(event.left)), trace.output) for f in functions):
            yield True, event.left


def _back(
    trace: _Trace, inner: ViT, target: Tensor, end: int
) -> tuple[Features, list[nn.Module]] | None:
    """The pool that ``target`` is made of, and the modules on the way, in call order."""
    features = _pool(trace, inner, target)
    if features is not None:
        return features, []
    # Activations are often called as functions, between the modules of a head.
    made = [
        (i, function)
        for function in (None, *_FUNCTIONS)
        for i in range(end)
        if _made(trace.events[i].left, function, target)
    ]
    # A module without children is read closer than one that holds it.
    made.sort(key=lambda m: (any(True for _ in trace.events[m[0]].module.children()), -m[0]))
    for index, function in made:
        event = trace.events[index]
        found = _back(trace, inner, event.entered, index)
        if found is not None:
            return found[0], [*found[1], event.module, *([] if function is None else [function])]
    return None


def _made(left: Tensor, function: nn.Module | None, target: Tensor) -> bool:
    if function is None:
        return _same(left, target)
    return left.shape == target.shape and _same(function(left), target)


def _pool(trace: _Trace, inner: ViT, target: Tensor) -> Features | None:
    """The features that equal ``target``."""
    if target.dim() > 2 and target[0].numel() != target.shape[-1]:
        return None
    prefix, width = inner.prefix_tokens, trace.tokens.shape[-1]
    cls, patches, every = slice(0, 1), slice(prefix, None), slice(0, None)
    groups: list[tuple[slice, ...]] = [(slice(i, i + 1),) for i in range(prefix)]
    groups += [(patches,), (every,)]
    groups += [(cls, patches)] if prefix else []
    norms = [e.module for e in trace.events if _same(e.entered, trace.tokens)]
    known = [None, *(Norm(m) for m in norms if not _classifies(m))]
    for norm in known:
        for group in groups:
            features = Features(group, width, prefix, norm)
            if _same(features.pooled(trace.tokens[:, features.reads]), target):
                return features
    own = inner.features
    if own is not None and own.pool is not None:
        norms_ = (own.token_norm, own.pooled_norm)
        pooled = AttentionPooled(own.pool, None, own.reads, own.width, *norms_)
        if _same(pooled(trace.tokens[:, own.reads]), target):
            return own
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    if one.numel() != other.numel() or one.shape[0] != other.shape[0]:
        return False
    narrow = min(one.dtype, other.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
    tolerance = 2e-2 if torch.finfo(narrow).eps > 1e-4 else 1e-5
    a, b = upcast(one).flatten(1), upcast(other).flatten(1)
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
