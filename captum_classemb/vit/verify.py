"""Check that an adapter's reading of a model reproduces what the model computes.

Once for each structure and state of the weights, on all rows: attention's output is W_O of A·V with
what lies between, a block adds its branches to the residual stream, the readout of the last hidden
state gives the logits, and a patch's pixels reach that patch's token. The same identities are
compared at every call at the rows that are read, by :mod:`~captum_classemb.vit.forward_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import attrgetter
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.precision import no_autocast, upcast
from captum_classemb.hooks import before, hooks_removed, uncompiled
from captum_classemb.readout import OutputPath
from captum_classemb.vit.active_edits import edits_paused, refuse_edits
from captum_classemb.vit.checks import TOLERANCE, differs, reading
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import Call
from captum_classemb.vit.record import Recording, record

__all__ = ["call_tolerance", "identities", "refuse_random_forward", "verify"]

#: Rounding that a reconstruction from a whole pass may show, relative to the largest entry.
WHOLE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}

#: The same for models with quantised layers, whose activations are rounded to eight bits.
QUANTISED = 5e-2

_RATES = ("p", "drop_prob", "prob", "dropout", "attention_dropout", "dropout_prob")


def refuse_random_forward(model: nn.Module) -> None:
    """Raise InputError if the model's forward pass is random or updates statistics.

    A model in train mode without active dropout, drop path or batch norm computes what it does in
    eval mode, and passes.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        rates = (getattr(module, rate, 0.0) for rate in _RATES)
        random = any(isinstance(rate, float) and rate > 0.0 for rate in rates)
        if random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"the model is in train mode and {name} ({type(module).__name__}) is active: "
                "call model.eval() first."
            )


def _tolerance(vit: ViT, pixels: Tensor, table: dict[torch.dtype, float]) -> float:
    dtype = vit.dtype
    if torch.is_autocast_enabled(pixels.device.type):
        dtype = torch.get_autocast_dtype(pixels.device.type)
    tolerance = table.get(dtype, table[torch.float32])
    return max(tolerance, QUANTISED) if vit.quantised else tolerance


def call_tolerance(vit: ViT, pixels: Tensor) -> float:
    """What rounding a local identity may show in this call, relative to its largest entry."""
    return _tolerance(vit, pixels, TOLERANCE)


def verify(vit: ViT, pixels: Tensor, forward_args: tuple[Any, ...] = ()) -> None:
    """Compare reconstruction and model, unless this structure and these weights passed.

    Where structure or weights changed, the adapter reads the model again first.

    Raises:
        UnsupportedModelError: if they differ by more than rounding.
        InputError: if the model is in train mode with something random active, or its forward
            pass is edited.
    """
    refuse_edits()
    with edits_paused():
        _verify(vit, pixels, forward_args)


def _verify(vit: ViT, pixels: Tensor, forward_args: tuple[Any, ...]) -> None:
    state, training = _state(vit)
    if training:
        refuse_random_forward(vit.model)
    if (state, pixels.shape[1:]) in vit.verified:
        return
    with reading(vit.model):
        vit.read_again()
    vit.check_inputs(pixels, forward_args=forward_args)
    vit.quantised = any("quantized" in type(m).__module__ for m in vit.model.modules())
    tolerance = _tolerance(vit, pixels, WHOLE)
    # Further arguments may hold a row for each image of the batch.
    some = pixels if any(isinstance(arg, Tensor) for arg in forward_args) else pixels[:2]
    with torch.no_grad(), uncompiled():
        vit(some, *forward_args)
    # The model itself runs: what fails now is its reading.
    with reading(vit.model), _in_float32(vit) as in_float32:
        if in_float32:
            some, tolerance = some.float(), WHOLE[torch.float32]
        errors = _errors(vit, some, forward_args)
    for what, by_block in errors.items():
        for block, error in enumerate(by_block):
            if not error <= tolerance:
                where = "" if what == "logits" else f" of block {block}"
                raise UnsupportedModelError(
                    differs(vit.model, what + where, error, "one of the first images")
                )
    _compare_token_order(vit, pixels[:1], forward_args)
    if len(vit.verified) > 64:
        vit.verified.clear()
    vit.verified.add((_state(vit)[0], pixels.shape[1:]))


@contextmanager
def _in_float32(vit: ViT) -> Iterator[bool]:
    """Within the context a model in half precision runs on its weights in float32.

    The model is never converted: each call borrows the upcast weights. Yields whether it does so.
    """
    half = vit.dtype in (torch.float16, torch.bfloat16)
    if not half or vit.quantised:
        yield False
        return
    call = vit.call
    model = _Calling(vit.model, call or vit.model)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wide = {k: t.detach().float() if t.is_floating_point() else t for k, t in own.items()}

    def borrowing(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, wide, args, kwargs)

    vit.call = borrowing
    try:
        device = next(iter(own.values())).device
        with torch.autocast(device.type, enabled=False):
            yield True
    finally:
        vit.call = call


class _Calling(nn.Module):
    """A model with the way in which it is called as its forward."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that a module is not registered a second time.
        self.call = (call,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call[0](*args, **kwargs)


def _state(vit: ViT) -> tuple[int, bool]:
    """A number that changes with tensors, modules, hooks, replaced methods and plain attributes.

    Hooks are told apart by their code and what it holds: a recorder that is set anew for each call
    is known.

    Returns:
        the number, and whether a module is in train mode.
    """
    # The dictionaries themselves are read: attributes of modules are ten times slower.
    modules = [vit.model]
    own = [vit.model.__dict__]
    for module in own:
        if module["_modules"]:
            children = [child for child in module["_modules"].values() if child is not None]
            modules += children
            own += [child.__dict__ for child in children]
    tensors = [t for module in own for t in module["_parameters"].values() if t is not None]
    tensors += [
        t
        for module in own
        if module["_buffers"]
        for t in module["_buffers"].values()
        if t is not None
    ]
    kinds: list[Any] = list(map(type, modules))
    parts: list[Any] = [*map(id, modules), *map(id, kinds), *map(id, tensors)]
    # A forward that is replaced in a class is replaced in all its modules.
    parts.append(frozenset([id(kind.forward) for kind in set(kinds)]))
    parts += map(Tensor.data_ptr, tensors)
    try:
        parts += map(_VERSION, tensors)
    except RuntimeError:  # Tensors made under inference mode count no versions.
        parts += [0 if t.is_inference() else t._version for t in tensors]
    parts += map(_code, (*_GLOBAL._global_forward_hooks.values(),))
    parts += map(_code, (*_GLOBAL._global_forward_pre_hooks.values(),))
    for module in own:
        if module["_forward_hooks"] or module["_forward_pre_hooks"] or "forward" in module:
            hooks = (*module["_forward_hooks"].values(), *module["_forward_pre_hooks"].values())
            parts += (id(module), *map(_code, hooks), _code(module.get("forward")))
    read = [vit.model, *(m for m in vit.model._modules.values() if m is not None)]
    for block in vit.blocks:
        read += [block.module, *[attention.module for attention in block.attentions]]
    parts += [x for module in read for x in module.__dict__.values() if type(x) in _PLAIN]
    return hash(tuple(parts)), any([module.get("training", False) for module in own])


def _code(hook: Any, depth: int = 4) -> Any:
    """What tells one hook from another: its code, and the functions and numbers that it holds."""
    if type(hook) in _PLAIN or depth == 0:
        return hook if type(hook) in _PLAIN else None
    if isinstance(hook, partial):
        held = [hook.func, *hook.args, *hook.keywords.values()]
    elif isinstance(hook, MethodType):
        held = [hook.__func__, *getattr(hook.__self__, "__dict__", {}).values()]
    elif isinstance(hook, FunctionType):
        cells = [cell.cell_contents for cell in hook.__closure__ or () if cell != _EMPTY]
        held = [*cells, *(hook.__defaults__ or ())]
    elif not callable(hook) or isinstance(hook, type):
        return None
    else:
        held = [] if isinstance(hook, nn.Module) else [*getattr(hook, "__dict__", {}).values()]
    own = getattr(hook, "__code__", None) or type(hook)
    return (id(own), *[_code(part, depth - 1) for part in held])


_EMPTY = CellType()
_GLOBAL = nn.modules.module
_VERSION = attrgetter("_version")
_PLAIN = frozenset((int, float, bool, str, tuple))


class _ReachedError(Exception):
    """The tokens of the first block are there: the rest of the pass is not needed."""


def _embedding(vit: ViT, pixels: Tensor, forward_args: tuple[Any, ...]) -> Tensor:
    found: list[Tensor] = []

    def stop(args: tuple[Any, ...], kwargs: Any) -> None:
        found.append(Call(args, kwargs).argument(vit.blocks[0].stream).clone())
        raise _ReachedError

    hooked = hooks_removed([before(vit.blocks[0].module, stop)])
    with hooked, torch.no_grad(), suppress(_ReachedError):
        vit(pixels, *forward_args)
    return found[0]


def _compare_token_order(vit: ViT, pixels: Tensor, forward_args: tuple[Any, ...]) -> None:
    """The pixels of a patch reach the token of that patch more than any other."""
    if any(isinstance(arg, Tensor) for arg in forward_args) or vit.blocks[0].stream:
        return
    several = sum(isinstance(m, nn.Conv2d) for m in vit.model.modules()) > 1
    h, w = vit.grid((pixels.shape[2], pixels.shape[3]))
    places = torch.arange(h * w, device=pixels.device)
    if several or h * w > 1024:
        places = places[:: max(1, h * w // 6)]
    mask = vit.feature_mask((pixels.shape[2], pixels.shape[3])).to(pixels.device)
    before_change = upcast(_embedding(vit, pixels, forward_args))[:, vit.prefix_tokens :]
    if before_change.shape[1] != h * w:
        raise UnsupportedModelError(
            f"{type(vit.model).__qualname__} makes {before_change.shape[1]} patch tokens of an "
            f"image of {pixels.shape[2]}×{pixels.shape[3]} pixels where {h}×{w} are expected."
        )
    for some in places.split(32):
        changed = torch.where(mask == some[:, None, None, None], pixels.flip(-1) + 1.0, pixels)
        after_change = upcast(_embedding(vit, changed, forward_args))[:, vit.prefix_tokens :]
        moved = (after_change - before_change).square().sum(-1)
        own = moved.gather(1, some[:, None])[:, 0]
        # A stem of several convolutions sees beyond the patch: its token need only move more.
        rest = moved.scatter(1, some[:, None], 0.0)
        bound = rest.median(1).values if several else 1e8 * rest.amax(1)
        wrong = ~((own > bound) & (own > 0)) if h * w > 1 else ~(own > 0)
        for place in some[wrong].tolist():
            raise UnsupportedModelError(
                f"the pixels of patch {place} (row {place // w}, column {place % w}) do not reach "
                f"that patch's token of {type(vit.model).__qualname__} alone: pixels or tokens are "
                "moved before the blocks, so no map of pixels is possible; explain the model "
                "behind what moves them."
            )


def identities(vit: ViT, pixels: Tensor, forward_args: tuple[Any, ...] = ()) -> dict[str, float]:
    """How far each identity is from holding on all rows, relative to the largest entry compared.

    Returns:
        ``"attention outputs"``, ``"MLP outputs"``, ``"block outputs"`` and, for a model with a
        classifier, ``"logits"``.
    """
    errors = _errors(vit, pixels, forward_args)
    # A NaN is greater than any tolerance, and not hidden by the others.
    return {name: float(torch.tensor(values).max()) for name, values in errors.items()}


def _errors(vit: ViT, pixels: Tensor, forward_args: tuple[Any, ...]) -> dict[str, list[float]]:
    """The same for each block; of parallel modules the greatest, or NaN."""
    sites = ("attention", "attn_path", "mlp_path", "mlp_coefficients", "resid_pre", "resid_post")
    recording = record(vit, pixels, [*sites, "values"], forward_args=forward_args)
    errors: dict[str, list[float]] = {}
    with no_autocast(pixels.device):
        for block in range(len(vit.blocks)):
            _block_errors(recording, block, errors)
        if vit.has_readout:
            final = recording["resid_post"][-1][:, vit.readout.reads]
            # What a head makes of an image is its own business, whatever else is in the batch.
            alone = _error(vit.readout(final[:1]), recording.logits[:1])
            whole = _error(vit.readout(final), recording.logits)
            errors["logits"] = [float(torch.tensor([alone, whole]).max())]
    return errors


def _block_errors(recording: Recording, block: int, errors: dict[str, list[float]]) -> None:
    total = upcast(recording["resid_pre"][block])
    found: dict[str, list[float]] = {"attention outputs": [], "MLP outputs": []}
    attention = zip(
        recording["attn_path"][block],
        recording["attention"][block],
        recording["values"][block],
        strict=True,
    )
    for path, weights, values in attention:
        mixed = (weights @ upcast(values)).transpose(1, 2).flatten(2)
        rebuilt = OutputPath.of(path.steps, mixed).output
        found["attention outputs"].append(_error(rebuilt, path.output))
        total = total + upcast(path.output)
    mlp = zip(recording["mlp_path"][block], recording["mlp_coefficients"][block], strict=True)
    for path, coefficients in mlp:
        rebuilt = OutputPath.of(path.steps, upcast(coefficients)).output
        found["MLP outputs"].append(_error(rebuilt, path.output))
        total = total + upcast(path.output)
    found["block outputs"] = [_error(total, recording["resid_post"][block])]
    for name, values_ in found.items():
        errors.setdefault(name, []).append(float(torch.tensor(values_).max()))


def _error(rebuilt: Tensor, real: Tensor) -> float:
    real = upcast(real)
    scale = real.abs().max().clamp_min(torch.finfo(real.dtype).tiny)
    return float((upcast(rebuilt) - real).abs().max() / scale)
