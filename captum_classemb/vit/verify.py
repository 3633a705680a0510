"""Check that an adapter's reading of a model reproduces what the model computes.

Every closed form rests on three identities: attention's output is W_O of A·V with what lies
between, a block adds its branches to the residual stream, and the readout of the last hidden
state gives the logits. They are compared once for each state of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.functional.precision import exact, wide
from captum_classemb.readout import Chain
from captum_classemb.vit.active_edits import refuse_edits
from captum_classemb.vit.parts import ViT
from captum_classemb.vit.record import ALL, Recording, record

__all__ = ["identities", "refuse_random_forward", "verify"]

#: Rounding that a reconstruction may show, relative to the largest entry, by dtype of the model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: The same for models with quantised layers, whose activations are rounded to eight bits.
QUANTISED_TOLERANCE = 5e-2

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


def verify(vit: ViT, pixels: Tensor, forward_args: tuple[Any, ...] = ()) -> None:
    """Compare reconstruction and model on one image, unless this state of the weights passed.

    Raises:
        UnsupportedModelError: if they differ by more than rounding.
        InputError: if the model is in train mode with something random active, or its forward
            pass is edited.
    """
    refuse_random_forward(vit.model)
    refuse_edits()
    state = _state(vit)
    if vit.verified_state == state:
        return
    tolerance = TOLERANCE.get(vit.dtype, 1e-3)
    if torch.is_autocast_enabled(pixels.device.type):
        tolerance = TOLERANCE[torch.bfloat16]
    if any("quantized" in type(module).__module__ for module in vit.model.modules()):
        tolerance = max(tolerance, QUANTISED_TOLERANCE)
    # Further arguments may hold a row for each image of the batch.
    some = pixels if any(isinstance(arg, Tensor) for arg in forward_args) else pixels[:1]
    for name, error in identities(vit, some, forward_args).items():
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{type(vit.model).__qualname__} does not compute what its structure says: its "
                f"{name} differ from the reconstruction by {error:.1e} of the largest entry, so "
                "no exact attribution is possible (was a forward method replaced?)."
            )
    vit.verified_state = state


def _state(vit: ViT) -> int:
    """A number that changes when a parameter's or buffer's storage or version does."""
    tensors = [*vit.model.parameters(), *vit.model.buffers()]
    return hash(
        tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)
    )


def identities(vit: ViT, pixels: Tensor, forward_args: tuple[Any, ...] = ()) -> dict[str, float]:
    """How far each identity is from holding, relative to the largest entry compared.

    Returns:
        ``"attention outputs"``, ``"MLP outputs"``, ``"block outputs"`` and, for a model with a
        classifier, ``"logits"``.
    """
    reads = vit.readout.reads if vit.has_readout else ALL
    sites = dict.fromkeys(
        ("attention", "attn_tail", "mlp_tail", "mlp_coefficients", "resid_pre", "resid_post"),
        reads,
    )
    recording = record(vit, pixels, sites | {"values": ALL}, forward_args=forward_args)
    with exact(pixels.device):
        errors = {"attention outputs": 0.0, "MLP outputs": 0.0, "block outputs": 0.0}
        for block in range(len(vit.blocks)):
            for name, error in _block_errors(recording, block).items():
                errors[name] = max(errors[name], error)
        if vit.has_readout:
            logits = vit.readout(recording["resid_post"][-1])
            errors["logits"] = _error(logits, recording.logits)
    return errors


def _block_errors(recording: Recording, block: int) -> dict[str, float]:
    errors = {"attention outputs": 0.0, "MLP outputs": 0.0}
    total = wide(recording["resid_pre"][block])
    attention = zip(
        recording["attn_tail"][block],
        recording["attention"][block],
        recording["values"][block],
        strict=True,
    )
    for tail, weights, values in attention:
        mixed = (weights @ wide(values)).transpose(1, 2).flatten(2)
        errors["attention outputs"] = _error(Chain.of(tail.steps, mixed).output, tail.output)
        total = total + wide(tail.output)
    mlp = zip(recording["mlp_tail"][block], recording["mlp_coefficients"][block], strict=True)
    for tail, coefficients in mlp:
        rebuilt = Chain.of(tail.steps, wide(coefficients)).output
        errors["MLP outputs"] = max(errors["MLP outputs"], _error(rebuilt, tail.output))
        total = total + wide(tail.output)
    errors["block outputs"] = _error(total, recording["resid_post"][block])
    return errors


def _error(rebuilt: Tensor, real: Tensor) -> float:
    real = wide(real)
    scale = real.abs().max().clamp_min(torch.finfo(real.dtype).tiny)
    return float((wide(rebuilt) - real).abs().max() / scale)
