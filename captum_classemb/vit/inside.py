"""A Vision Transformer inside a model: what becomes of its last tokens is found by one call.

A model is read if exactly one of its submodules can be adapted, and the modules called after its
last block, one on the output of the other, lead from a pool of its last tokens to what the model
returns. The pool is the class token, the mean of the patches, the mean of all tokens, or the class
token beside the mean of the patches, of tokens with or without a norm of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import ClassEmbWarning, UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.hooks import after, hooks_removed
from captum_classemb.readout import AttentionPooled, Norm, Readout
from captum_classemb.readout.features import Features, layers_of
from captum_classemb.vit.model import ViT, logits_of
from captum_classemb.vit.seen import NotCalledError, Trace, called, refusal, with_another_size
from captum_classemb.vit.transformer_encoder import encoders_of
from captum_classemb.vit.verify import refuse_random_forward

__all__ = ["read_encoder", "read_inside"]

_SCORES = (nn.Softmax, nn.Sigmoid, nn.LogSoftmax, nn.LogSigmoid)
_FUNCTIONS = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh())
_PREFIX = 16


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
    return _read(model, path, inner, called(model, path, inner))


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
        with suppress(NotCalledError):
            trace = called(model, path, inner)
            h, w = inner.grid(trace.size)
            inner.prefix_tokens = trace.tokens.shape[1] - h * w
            inner.image_size = trace.size
            if 0 <= inner.prefix_tokens <= _PREFIX:
                return _read(model, path, inner, trace)
    raise UnsupportedModelError(
        f"{type(model).__qualname__} holds an nn.TransformerEncoder, but no layer that makes one "
        "token of each patch was found before it: register_adapter can say how it is built."
    )


def _read(model: nn.Module, path: str, inner: ViT, trace: Trace) -> ViT:
    found = _readout(trace, inner)
    if found is None:
        raise UnsupportedModelError(refusal(model, path, inner, "is not made by modules alone"))
    readout, features, last = found
    fixed = trace.received if trace.received != trace.size else None
    image_size = inner.image_size
    if fixed is None and image_size is not None:
        given, received = with_another_size(model, inner, trace)
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


# -- From the output back to the pool


_Found = tuple[Readout | None, Features | None, nn.Module | None]


def _readout(trace: Trace, inner: ViT) -> _Found | None:
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


def _before_scores(trace: Trace) -> Iterator[tuple[bool, Tensor]]:
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
    trace: Trace, inner: ViT, target: Tensor, end: int
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


def _pool(trace: Trace, inner: ViT, target: Tensor) -> Features | None:
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
