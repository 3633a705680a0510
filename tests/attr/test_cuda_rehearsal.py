"""A CUDA run rehearsed without a GPU: fake tensors on a fake device, which compute nothing.

Each operation checks that its tensors lie on one device, and each place is seen where the host
waits for the device or copies to it. Values asked of the device are answered with "it holds".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, WITHOUT_DIRECTIONS, build, images
from methods import METHODS as ALL_METHODS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from captum_classemb.attr._forward_pass import ForwardPassAttribution
from captum_classemb.errors import TargetError
from captum_classemb.functional import grid
from captum_classemb.vit import forward_pass

aten = torch.ops.aten

#: Derivatives by autograd need a device: those of readouts that are no class embedding.
REHEARSED = [name for name in FAMILIES if name not in WITHOUT_DIRECTIONS]

METHODS = (
    "projection",
    "gradient",
    "gradient, log-probability",
    "memory, log-probability",
    "patch importance",
    "all paths",
)

#: These go through autograd, too, or cut tokens out by what a mask holds.
WITH_A_DEVICE = {"relevance of Chefer et al.", "LeGrad", "token occlusion"}

OTHERS = {k: v for k, v in ALL_METHODS.items() if k not in {*METHODS, *WITH_A_DEVICE}}

#: Identities are looked at at the end; a target comes from the host.
WAITS, COPIES = "finish", "late_targets"


def place() -> str:
    """The function of the package that is running."""
    frame: Any = sys._getframe()
    while frame is not None and "/captum_classemb/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "elsewhere" if frame is None else frame.f_code.co_name


class Watched(TorchDispatchMode):
    """Notes where the host waits for the device and where tensors go from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self.wait(args[0])
        if func is aten.equal.default:
            return bool(self.wait(args[0]))
        if func is aten._to_copy.default:
            goal = kwargs.get("device")
            if goal is not None and goal.type != args[0].device.type:
                self.copies.append(place())
        return func(*args, **kwargs)

    def wait(self, tensor: Tensor) -> Any:
        """A number of the device: True, no difference, or the first class but one."""
        if tensor.device.type == "cuda":
            self.waits.append(place())
        return {torch.bool: True}.get(tensor.dtype, 0.0 if tensor.is_floating_point() else 1)

    def list_of(self, tensor: Tensor) -> Any:
        """All numbers at once, for one wait."""
        number = self.wait(tensor)
        flat = [number] * tensor.numel()
        for size in reversed(tensor.shape[1:]):
            flat = [flat[i : i + size] for i in range(0, len(flat), size)]
        return flat


@contextmanager
def rehearsal(family: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[nn.Module, Tensor]]:
    """A model and images on the fake device, the model's reading taken as verified."""
    monkeypatch.setattr("captum_classemb.attr._inputs.verify", lambda *_: None)
    # What was made once for a device is not of this rehearsal's.
    for made_once in (grid._pixels, forward_pass._head_columns):
        made_once.cache_clear()
    model, size = build(family, torch.float32), images(family).shape[1:]
    swapping = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            model._apply(lambda tensor: mode.from_tensor(tensor.detach()).to("cuda"))
            yield model, torch.empty(2, *size, device="cuda")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(swapping)
        for made_once in (grid._pixels, forward_pass._head_columns):
            made_once.cache_clear()


def watched(run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Watched]:
    with Watched() as seen:
        # Its own asks for one number after the other.
        monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: seen.list_of(tensor))
        return run(), seen


def on_device(*classes: int) -> Tensor:
    return torch.empty(len(classes), dtype=torch.int64, device="cuda")


CALLS = {
    "attribute": (16, lambda method, x: method.attribute(x, [1, 2])),
    "targets on the device": (16, lambda method, x: method.attribute(x, on_device(1, 2))),
    "a few classes": (16, lambda method, x: method.attribute_classes(x)),
    "many classes": (2, lambda method, x: method.attribute_classes(x)),
}


@pytest.mark.parametrize("family", REHEARSED)
def test_calls_stay_on_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of two devices meets; the host waits at the end alone."""
    with rehearsal(family, monkeypatch) as (model, x):
        # The last blocks of CaiT write to no patch.
        for name in METHODS[family == "cait" :]:
            method = ALL_METHODS[name](model)
            for kind, (at_once, call) in CALLS.items():
                monkeypatch.setattr(ForwardPassAttribution, "_AT_ONCE", at_once)
                maps, seen = watched(partial(call, method, x), monkeypatch)
                where = f"{name}, {kind}"
                assert maps.device.type == "cuda" and maps.dtype == torch.float32, where
                assert set(seen.waits) <= {WAITS}, where
                assert seen.copies == ([COPIES] if kind == "attribute" else []), where


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_mix_no_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may wait as they please: some run the model many times."""
    with rehearsal("cls", monkeypatch) as (model, x):
        method = OTHERS[name](model)
        for kind, (_, call) in CALLS.items():
            if "classes" not in kind or hasattr(method, "attribute_classes"):
                maps, _ = watched(partial(call, method, x), monkeypatch)
                assert maps.device.type == "cuda"


@pytest.mark.parametrize("name", METHODS)
def test_targets_out_of_range_are_told_at_the_end(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the device answers that a condition fails, the target is what is refused."""
    with rehearsal("cls", monkeypatch) as (model, x):
        method = ALL_METHODS[name](model)
        monkeypatch.setattr(Watched, "list_of", lambda self, t: [1.0] * t.numel())
        call = partial(method.attribute_patches, x, on_device(1, 2))
        with pytest.raises(TargetError, match="out of range: classes are 0 to"):
            watched(call, monkeypatch)


@pytest.mark.parametrize("name", METHODS[1:])
def test_the_host_waits_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal("cls", monkeypatch) as (model, x):
        method = ALL_METHODS[name](model)
        for _, call in CALLS.values():
            _, seen = watched(partial(call, method, x), monkeypatch)
            assert len(seen.waits) <= 1
