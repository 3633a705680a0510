"""What a refusal says, and what starts the verification of all rows again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn

from captum_classemb import ClassEmbeddingGradient, MemoryPatchImportance
from captum_classemb.errors import UnsupportedModelError

verifying = importlib.import_module("captum_classemb.vit.verify")
Setting = Callable[[nn.Module], Any]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5
    ).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def steer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 0.5


def steer_input(module: nn.Module, args: Any) -> Any:
    return (args[0] + 0.5,)


def twice(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return 2 * forward(*args, **kwargs)


def on(name: str, hook: Any, before: bool = False) -> Setting:
    def set_on(model: nn.Module) -> Any:
        module = model.get_submodule(name)
        return (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)

    return set_on


def replaced(name: str) -> Setting:
    def set_on(model: nn.Module) -> None:
        module = model.get_submodule(name)
        module.forward = partial(twice, module.forward)  # type: ignore[method-assign]

    return set_on


@pytest.mark.parametrize("after_first_call", [False, True])
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        (on("blocks.1", steer_input, before=True), r"hook steer_input on blocks\.1"),
        (on("blocks.2.mlp", steer), r"hook steer on blocks\.2\.mlp"),
        (on("blocks.2.attn.qkv", lambda m, i, o: o + 1), None),
        (on("blocks.2.norm2", partial(steer)), None),
        (on("blocks.3", steer), r"hook steer on blocks\.3"),
        (on("head", steer), r"hook steer on head"),
        (on("norm", steer), r"hook steer on norm"),
        (replaced("blocks.0.attn"), r"replaced forward of blocks\.0\.attn"),
        (replaced("blocks.0"), r"replaced forward of blocks\.0"),
    ],
)
def test_what_was_set_by_hand_is_named(
    model: Any, images: Tensor, setting: Setting, named: str | None, after_first_call: bool
) -> None:
    method = MemoryPatchImportance(model)
    if after_first_call:
        method.attribute(images, 1)
    setting(model)
    if named is None:
        # Inside a branch, before what is read of it: the reading holds with the hook.
        method.attribute(images, 1)
        return
    with pytest.raises(UnsupportedModelError, match=named):
        method.attribute(images, 1)


def test_only_three_are_named(model: Any, images: Tensor) -> None:
    for block in model.blocks:
        block.register_forward_hook(steer)
    model.head.register_forward_hook(steer)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2 and 2 more\?"):
        MemoryPatchImportance(model).attribute(images, 1)


class Recorder:
    """A recorder as people write them: set for one call, then removed."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)


def recorder_function() -> Callable[..., None]:
    kept: list[Tensor] = []
    return lambda module, args, output: kept.append(output)


def _append(kept: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    kept.append(output)


RECORDERS = {
    "a method": lambda: Recorder().hook,
    "a closure": recorder_function,
    "a partial": lambda: partial(_append, []),
}


def verified_passes(method: Any, call: Callable[[], Any]) -> int:
    with mock.patch.object(verifying, "_errors", wraps=verifying._errors) as compared:
        call()
    return compared.call_count


@pytest.mark.parametrize("kind", RECORDERS)
def test_a_recorder_set_anew_for_each_call_is_verified_once(
    kind: str, model: Any, images: Tensor
) -> None:
    method = ClassEmbeddingGradient(model)
    method.attribute(images, 1)

    def with_recorder() -> None:
        handle = model.blocks[1].register_forward_hook(RECORDERS[kind]())
        method.attribute(images, 1)
        handle.remove()

    assert verified_passes(method, with_recorder) == 1
    for _ in range(3):
        assert verified_passes(method, with_recorder) == 0
        assert verified_passes(method, lambda: method.attribute(images, 1)) == 0


def hook_that(change: Any) -> Callable[..., Tensor]:
    """One function for every change: its code is always the same."""
    return lambda module, args, output: change(output)


class Move:
    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.roll(self.by, -1)


@pytest.mark.parametrize(
    ("harmless", "harmful"),
    [
        (hook_that(lambda x: x), hook_that(lambda x: x.flip(-1))),
        (hook_that(partial(torch.roll, shifts=0, dims=-1)),
         hook_that(partial(torch.roll, shifts=1, dims=-1))),
        (Move(0), Move(1)),
        (Move(0).__call__, Move(1).__call__),
    ],
)  # fmt: skip
def test_a_hook_that_does_something_else_is_verified_again(
    model: Any, images: Tensor, harmless: Any, harmful: Any
) -> None:
    method = ClassEmbeddingGradient(model)
    handle = model.patch_embed.proj.register_forward_hook(harmless)
    method.attribute(images, 1)
    handle.remove()
    model.patch_embed.proj.register_forward_hook(harmful)
    with pytest.raises(UnsupportedModelError, match="pixels of patch"):
        method.attribute(images, 1)


class Shuffled(timm.layers.PatchEmbed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


def of_another_class(model: Any) -> Callable[[], None]:
    model.patch_embed.__class__ = Shuffled
    return lambda: None


def hook_on_every_module(model: Any) -> Callable[[], None]:
    def shuffle(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output.flip(-1) if isinstance(module, nn.Conv2d) else None

    return torch.nn.modules.module.register_module_forward_hook(shuffle).remove


def forward_of_the_class(model: Any) -> Callable[[], None]:
    kind = type(model.patch_embed)
    own = kind.forward

    def shuffled(self: Any, x: Tensor) -> Tensor:
        tokens: Tensor = own(self, x)
        return tokens.flip(1)

    kind.forward = shuffled

    def undo() -> None:
        kind.forward = own

    return undo


@pytest.mark.parametrize("change", [of_another_class, hook_on_every_module, forward_of_the_class])
def test_what_leaves_no_trace_in_a_module_is_noticed(
    model: Any, images: Tensor, change: Callable[[Any], Callable[[], None]]
) -> None:
    method = MemoryPatchImportance(model)
    method.attribute(images, 1)
    undo = change(model)
    try:
        with pytest.raises(UnsupportedModelError, match="pixels of patch"):
            method.attribute(images, 1)
    finally:
        undo()


def test_a_hook_on_every_module_is_named(model: Any, images: Tensor) -> None:
    def louder(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return 2 * output if isinstance(module, nn.Linear) and output.dim() == 2 else None

    handle = torch.nn.modules.module.register_module_forward_hook(louder)
    try:
        with pytest.raises(UnsupportedModelError, match="hook .*louder on every module"):
            MemoryPatchImportance(model).attribute(images, 1)
    finally:
        handle.remove()
