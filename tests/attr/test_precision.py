"""Half precision and autocast: maps stay within a stated distance of those in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny
from methods import METHODS
from torch import Tensor

from captum_classemb import MemoryPatchImportance
from captum_classemb.errors import UnsupportedModelError

TARGET = torch.tensor([2, 0, 6])

#: Largest difference from float64 with the same rounded weights, relative to the largest entry.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 6e-3}


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 3, 32, 32, generator=generator).bfloat16()


def distance(name: str, maps: Tensor, expected: Tensor) -> float:
    apart = float((maps.double() - expected).abs().max())
    if "identifiability" in name or name == "linear probes":
        # Logits that lie close together may change places: by one rank, of seven classes.
        return 0.0 if apart <= 1 / 7 + 1e-6 else apart
    return apart / float(expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", METHODS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    half: Any = tiny().to(dtype)
    maps = METHODS[name](half).attribute(pixels(), TARGET)
    expected = METHODS[name](half.double()).attribute(pixels(), TARGET)
    assert distance(name, maps, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", METHODS)
def test_autocast(name: str) -> None:
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = METHODS[name](model).attribute(pixels(), TARGET)
        assert torch.is_autocast_enabled("cpu")
    expected = METHODS[name](model.double()).attribute(pixels(), TARGET)
    assert distance(name, maps, expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_ledger_adds_up_in_half_precision(dtype: torch.dtype) -> None:
    ledger = MemoryPatchImportance(tiny().to(dtype)).ledger(pixels(), TARGET)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert ledger.attention.dtype == torch.float32
    assert bool((ledger.delta.abs() <= tolerance * ledger.magnitude).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_readings_of_half_precision_are_held_to_float32(dtype: torch.dtype) -> None:
    """What bfloat16 would take for rounding is seen on the weights in float32."""
    model: Any = tiny().to(dtype)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    images = torch.randn(2, 3, 32, 32)
    assert MemoryPatchImportance(model).attribute(images, 1).dtype == torch.float32
    for name, p in model.named_parameters():
        assert p.dtype == dtype and torch.equal(p, weights[name])
    model.blocks[1].attn.proj.register_forward_hook(lambda module, args, out: out * 1.02)
    with pytest.raises(UnsupportedModelError, match="attention outputs of block 1"):
        MemoryPatchImportance(model).attribute(images, 1)
