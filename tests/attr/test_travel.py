"""What leaves a method in half precision is float32; copies, pickles and wrappers keep a method."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from methods import METHODS, PIXEL_METHODS
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from captum_classemb import (
    AllPathImportance,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.errors import TargetError

PRIMARY: dict[str, Any] = {
    "projection": ClassEmbeddingProjection,
    "gradient": ClassEmbeddingGradient,
    "memory": MemoryPatchImportance,
    "patches": PatchImportance,
    "paths": AllPathImportance,
}
TARGET = torch.tensor([2, 0, 6])


def pixels(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 3, 32, 32, generator=generator).to(dtype)


def outputs(method: Any, x: Tensor) -> dict[str, Tensor]:
    """All that a method of patches returns."""
    found = {
        "attribute": method.attribute(x, TARGET),
        "attribute_patches": method.attribute_patches(x, TARGET),
        "attribute_classes": method.attribute_classes(x),
        "some classes": method.attribute_classes(x, [1]),
    }
    if hasattr(method, "ledger"):
        memory = isinstance(method, MemoryPatchImportance)
        ledger = method.ledger(x, TARGET, **({"memories": True} if memory else {}))
        found |= {k: v for k, v in vars(ledger).items() if isinstance(v, Tensor)}
    return found


# -- Dtypes


@pytest.mark.parametrize("half", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("name", PIXEL_METHODS)
def test_maps_of_half_precision_are_float32(name: str, half: str) -> None:
    model: Any = tiny()
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        dtype = torch.float32 if half == "autocast" else getattr(torch, half)
        found = outputs(PIXEL_METHODS[name](model.to(dtype)), pixels(dtype))
    for kind, maps in found.items():
        assert maps.dtype == torch.float32, kind
        assert bool(torch.isfinite(maps).all()), kind


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", PRIMARY)
def test_all_classes_in_half_precision(name: str, half: str) -> None:
    """All classes are no further from float64 than one."""
    model: Any = tiny().to(getattr(torch, half))
    together = PRIMARY[name](model).attribute_classes(pixels(getattr(torch, half)))
    alone = PRIMARY[name](model).attribute_patches(pixels(getattr(torch, half)), 4)
    one = alone.flatten(1, -3).sum(1)
    assert float((together[:, 4] - one).abs().max()) <= 1e-5 * float(one.abs().max())


# -- Copies and pickles


def with_lora(model: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["qkv", "attn.proj", "fc2", "head"], r=4, init_lora_weights=False
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted.eval()


def with_weight_norm(model: Any) -> nn.Module:
    parametrizations.weight_norm(model.blocks[1].attn.proj)
    return model  # type: ignore[no-any-return]


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "plain": lambda model: model,
    "after preprocessing": lambda model: nn.Sequential(nn.Identity(), model),
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "low-rank adapters": with_lora,
    "parametrised": with_weight_norm,
    "checkpointed": lambda model: (model.set_grad_checkpointing(True), model)[1],
    "dropout before the head": lambda model: (
        setattr(model, "head", nn.Sequential(nn.Dropout(0.1), model.head).eval()),
        model,
    )[1],
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", PRIMARY)
def test_methods_of_wrapped_models_are_copied(name: str, wrapper: str, used: bool) -> None:
    method = PRIMARY[name](WRAPPERS[wrapper](tiny()))
    expected = method.attribute(pixels(), TARGET) if used else None
    copies = [copy.copy(method), copy.deepcopy(method)]
    # Torch itself refuses to pickle a module with parametrisations.
    copies += [] if wrapper == "parametrised" else [pickle.loads(pickle.dumps(method))]
    expected = method.attribute(pixels(), TARGET) if expected is None else expected
    for other in copies:
        assert torch.equal(other.attribute(pixels(), TARGET), expected)
        assert torch.equal(other.attribute_classes(pixels()), method.attribute_classes(pixels()))


@pytest.mark.parametrize("name", METHODS)
def test_a_deep_copy_has_a_model_of_its_own(name: str) -> None:
    method = METHODS[name](tiny())
    expected = method.attribute(pixels(), TARGET)
    other = copy.deepcopy(method)
    for parameter in other.forward_func.parameters():
        parameter.data.mul_(1.1)
    assert torch.equal(method.attribute(pixels(), TARGET), expected)


@pytest.mark.parametrize("name", PRIMARY)
def test_a_copy_sees_later_weights(name: str) -> None:
    model: Any = tiny()
    method = PRIMARY[name](model)
    method.attribute(pixels(), TARGET)
    other = copy.deepcopy(method)
    other.forward_func.model.blocks[0].mlp.fc2.weight.data.mul_(1.5)
    model.blocks[0].mlp.fc2.weight.data.mul_(1.5)
    fresh = PRIMARY[name](model).attribute(pixels(), TARGET)
    for used in (method, other):
        assert torch.allclose(used.attribute(pixels(), TARGET), fresh, rtol=1e-5, atol=1e-7)


# -- Targets that live on the device


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "int64": lambda target: target,
    "int32": lambda target: target.int(),
    "column": lambda target: target[:, None],
    "list of tensors": list,
    "numpy": lambda target: np.asarray(target.cpu()),
}


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
@pytest.mark.parametrize("name", PRIMARY)
def test_targets_as_tensors(name: str, device: str) -> None:
    method, x = PRIMARY[name](tiny().to(device)), pixels().to(device)
    plain = torch.cat([method.attribute(x[i : i + 1], int(c)) for i, c in enumerate(TARGET)])
    kept = TARGET.to(device)
    for form, make in FORMS.items():
        found = method.attribute(x, make(kept))
        assert found.device.type == device, form
        assert torch.allclose(found, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max())), form
    assert torch.equal(kept.cpu(), TARGET), "targets are left alone"


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
@pytest.mark.parametrize("wrong", [[2, 7, 0], [2, -1, 0]])
@pytest.mark.parametrize("name", PRIMARY)
def test_wrong_targets_on_the_device_are_reported(name: str, wrong: Any, device: str) -> None:
    method, x = PRIMARY[name](tiny().to(device)), pixels().to(device)
    calls = [method.attribute, method.attribute_patches]
    for call in [*calls, method.ledger] if name == "memory" else calls:
        with pytest.raises(TargetError, match=f"target {wrong[1]} .*classes are 0 to 6"):
            call(x, torch.tensor(wrong, device=device))
