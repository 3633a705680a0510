"""A forward pass recorded as events: modules entered and left, additions, mixing operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from captum_classemb.hooks import after, before, hooks_removed

EventKind = Literal[
    "enter", "exit", "add", "attention", "convolution", "pooling", "linear", "activation"
]

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mm"}
_ACTIVATIONS = {"gelu", "relu", "relu_", "silu", "hardswish", "leaky_relu", "elu", "mish", "relu6"}


class Event(NamedTuple):
    """Something that happened: in module ``path``, from ``inputs`` to ``output``."""

    kind: EventKind
    path: str
    inputs: tuple[Tensor, ...]
    output: object


def key(x: Tensor) -> tuple[int, int]:
    """What views of one tensor have in common: their memory and their size."""
    return x.untyped_storage().data_ptr(), x.numel()


def _tensors(values: Iterable[object]) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(_tensors(value))
    return tuple(found)


def _kind(name: str, inputs: tuple[Tensor, ...]) -> EventKind | None:
    if name in _ADDITIONS:
        return "add" if len(inputs) == 2 else None
    if "attention" in name:
        return "attention"
    if name in _PRODUCTS:
        # Attention weighs the data by the data; a product with a parameter is a linear layer.
        weighed = any(isinstance(x, nn.Parameter) for x in inputs)
        return "linear" if weighed or len(inputs) < 2 else "attention"
    if name in {"conv1d", "conv2d"}:
        return "convolution" if max(inputs[1].shape[2:]) > 1 else "linear"
    if name == "linear":
        return "linear"
    if "pool" in name and "adaptive" not in name:
        return "pooling"
    return "activation" if name in _ACTIVATIONS else None


class _Tracer(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        inputs = _tensors([*args, *(kwargs or {}).values()])
        if (kind := _kind(name, inputs)) is not None:
            # The events hold the tensors, so that no two of them share memory by chance.
            self.events.append(Event(kind, "", inputs, output))
        return output


def trace(model: nn.Module, images: Tensor) -> list[Event]:
    """Run ``model`` once on ``images`` B×3×H×W, without gradients, and return the events."""
    tracer = _Tracer()
    handles: list[RemovableHandle] = []

    def entered(path: str) -> Callable[..., None]:
        def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = _tensors([*args, *kwargs.values()])
            tracer.events.append(Event("enter", path, inputs, None))

        return hook

    def left(path: str) -> Callable[..., None]:
        def hook(args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            tracer.events.append(Event("exit", path, (), output))

        return hook

    with hooks_removed(handles), torch.no_grad(), tracer:
        for path, module in model.named_modules():
            handles += [before(module, entered(path)), after(module, left(path))]
        model(images)
    return tracer.events
