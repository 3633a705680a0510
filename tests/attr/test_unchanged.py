"""A model is left as it was found, also after an exception, and by two threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, images, tiny
from methods import METHODS, PIXEL_METHODS
from torch import Tensor, nn

from captum_classemb.errors import ClassEmbError, InputError, UnsupportedModelError

TARGET = torch.tensor([2, 0, 6])


def pixels(seed: int = 3) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a user may have set."""
    modules = dict(model.named_modules())
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "places": {k: (v.data_ptr(), v.dtype, v.device) for k, v in model.state_dict().items()},
        "grad": {k: (p.requires_grad, p.grad is None) for k, p in model.named_parameters()},
        "mode": {k: m.training for k, m in modules.items()},
        "hooks": {k: [dict(getattr(m, name)) for name in HOOKS] for k, m in modules.items()},
        "fused": {k: m.fused_attn for k, m in modules.items() if hasattr(m, "fused_attn")},
        "types": {k: type(m) for k, m in modules.items()},
        "attributes": {k: set(m.__dict__) for k, m in modules.items()},
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state(),
        "gradients": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key == "weights":
            assert before[key].keys() == after[key].keys()
            assert all(torch.equal(v, after[key][k]) for k, v in before[key].items())
        elif key == "random":
            assert torch.equal(before[key], after[key]), "random numbers were drawn"
        else:
            assert before[key] == after[key], key


def seen_before(model: Any) -> list[Any]:
    """A user's own settings: mixed modes, frozen weights, a gradient, hooks, an unfused block."""
    model.blocks[0].eval()
    model.blocks[1].train()
    model.blocks[1].attn.fused_attn = False
    model.head.weight.requires_grad_(False)
    model.blocks[2].mlp.fc1.weight.grad = torch.ones_like(model.blocks[2].mlp.fc1.weight)
    return [
        model.blocks[0].attn.register_forward_hook(lambda *_: None),
        model.norm.register_forward_pre_hook(lambda *_: None),
    ]


def run_all(method: Any, name: str) -> None:
    method.attribute(pixels(), TARGET)
    if name in PIXEL_METHODS:
        method.attribute_patches(pixels(), TARGET)
        method.attribute_classes(pixels(), [1, 2])
    if hasattr(method, "ledger"):
        method.ledger(pixels(), TARGET)


@pytest.mark.parametrize("name", METHODS)
def test_everything_is_as_it_was(name: str) -> None:
    model = tiny()
    seen_before(model)
    before = state(model)
    run_all(METHODS[name](model), name)
    assert_same(before, state(model))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["patch_embed", "blocks.1.attn", "blocks.2.mlp", "head"])
def test_also_after_an_exception_in_the_middle(name: str, where: str) -> None:
    model: Any = tiny()
    method = METHODS[name](model)
    expected = method.attribute(pixels(), TARGET)
    seen_before(model)
    module = model.get_submodule(where)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("in the middle")

    handle = module.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        run_all(method, name)
    assert_same(before, state(model))
    handle.remove()
    model.blocks[1].attn.fused_attn = True
    assert torch.allclose(method.attribute(pixels(), TARGET), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_also_after_a_refusal(name: str) -> None:
    model = tiny()
    seen_before(model)
    method = METHODS[name](model)
    before = state(model)
    wrong: list[tuple[Any, Any]] = [
        (pixels(), 7),
        (pixels(), None),
        (pixels()[:, :2], 1),
        (pixels() / 0, 1),
        (pixels()[..., :16], 1),
    ]
    for inputs, target in wrong:
        with pytest.raises(ClassEmbError):
            method.attribute(inputs, target)
    assert_same(before, state(model))


@pytest.mark.parametrize("name", METHODS)
def test_the_images_are_left_alone(name: str) -> None:
    given = pixels().requires_grad_(True)
    kept = given.detach().clone()
    METHODS[name](tiny()).attribute(given, TARGET)
    assert torch.equal(given, kept) and given.grad is None and given.requires_grad


@pytest.mark.parametrize("family", ["distilled", "torchvision", "hugging face, eager"])
def test_other_libraries(family: str) -> None:
    for name in ("gradient", "memory", "projection", "patch importance"):
        model = build(family)
        before = state(model)
        METHODS[name](model).attribute(images(family), 1)
        assert_same(before, state(model))


# -- Train mode


@pytest.mark.parametrize("name", METHODS)
def test_train_mode_without_anything_random_changes_nothing(name: str) -> None:
    model = tiny()
    expected = METHODS[name](model).attribute(pixels(), TARGET)
    maps = METHODS[name](model.train()).attribute(pixels(), TARGET)
    assert torch.allclose(maps, expected, rtol=1e-5, atol=1e-7)


RANDOM = {
    "dropout in the MLP": {"proj_drop_rate": 0.1},
    "dropout of attention weights": {"attn_drop_rate": 0.1},
    "drop path": {"drop_path_rate": 0.1},
    "dropout before the head": {"drop_rate": 0.1},
    "dropout of positions": {"pos_drop_rate": 0.1},
    "patch dropout": {"patch_drop_rate": 0.25},
}


@pytest.mark.parametrize("kind", RANDOM)
def test_train_mode_with_something_random_is_refused(kind: str) -> None:
    model = tiny(**RANDOM[kind]).train()
    for name in ("gradient", "memory", "projection", "memories of an MLP"):
        with pytest.raises(InputError, match=r"train mode.*model\.eval\(\)"):
            METHODS[name](model).attribute(pixels(), 1)
        METHODS[name](model.eval()).attribute(pixels(), 1)
        model.train()


# -- Weights that change


@pytest.mark.parametrize("name", METHODS)
def test_no_weight_is_remembered(name: str) -> None:
    """In place, by an optimiser, by loading, and by moving to another dtype."""
    model = tiny()
    method = METHODS[name](model)
    method.attribute(pixels(), TARGET)
    other = tiny(img_size=32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3).add_(0.01)
    expected = METHODS[name](other).attribute(pixels(), TARGET)
    model.load_state_dict(other.state_dict())
    assert torch.allclose(method.attribute(pixels(), TARGET), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), tiny().parameters(), strict=True):
            mine.data = theirs.data
    fresh = METHODS[name](tiny()).attribute(pixels(), TARGET)
    assert torch.allclose(method.attribute(pixels(), TARGET), fresh, rtol=1e-4, atol=1e-6)
    doubled = method.forward_func.model.double()
    exact = METHODS[name](doubled).attribute(pixels(), TARGET)
    assert torch.equal(method.attribute(pixels(), TARGET), exact)


def test_a_head_put_in_later_is_read_or_refused() -> None:
    for name in ("gradient", "memory", "projection"):
        model: Any = tiny()
        method = METHODS[name](model)
        method.attribute(pixels(), TARGET)
        model.head = nn.Linear(24, 7)
        expected = METHODS[name](model).attribute(pixels(), TARGET)
        try:
            maps = method.attribute(pixels(), TARGET)
        except UnsupportedModelError:
            continue
        assert torch.allclose(maps, expected, rtol=1e-4, atol=1e-6)


# -- Models that are not what they seem


def doubled(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def squashed(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x).tanh()


CHANGES: dict[str, Callable[[Any], None]] = {
    "attention": lambda model: doubled(model.blocks[1].attn),
    "MLP": lambda model: doubled(model.blocks[1].mlp),
    "block": lambda model: doubled(model.blocks[1]),
    "last norm": lambda model: doubled(model.norm),
    "head": lambda model: squashed(model.head),
    "whole model": doubled,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["gradient", "memory", "patch importance"])
def test_a_replaced_forward_is_refused(name: str, change: str) -> None:
    model = tiny()
    CHANGES[change](model)
    method = METHODS[name](model)
    with pytest.raises(UnsupportedModelError, match="does not compute what its structure says"):
        method.attribute(pixels(), TARGET)


@pytest.mark.parametrize("name", ["gradient", "memory", "patch importance"])
def test_a_linear_layer_with_a_forward_of_its_own_is_read_through_it(name: str) -> None:
    """It is not its weight that counts, and what it computes is still affine."""
    model, other = tiny().double(), tiny().double()
    doubled(model.head)
    with torch.no_grad():
        other.head.weight.mul_(2.0)
        other.head.bias.mul_(2.0)
    expected = METHODS[name](other).attribute(pixels().double(), TARGET)
    found = METHODS[name](model).attribute(pixels().double(), TARGET)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_hook_that_changes_an_output_is_refused_or_heeded() -> None:
    model: Any = tiny()
    model.blocks[1].attn.proj.register_forward_hook(lambda _, __, out: out * 2)
    for name in ("gradient", "memory"):
        with pytest.raises(UnsupportedModelError, match="does not compute what its structure says"):
            METHODS[name](model).attribute(pixels(), TARGET)


# -- Threads


@pytest.mark.parametrize("name", ["patch importance", "projection", "gradient", "memory"])
def test_two_threads_with_one_model(name: str) -> None:
    model = tiny()
    before = state(model)["hooks"]
    shared = METHODS[name](model)
    given = [pixels(1), pixels(2)]
    expected = [METHODS[name](model).attribute(x, TARGET) for x in given]
    wrong: list[str] = []
    start = threading.Barrier(2)

    def run(index: int) -> None:
        start.wait()
        for turn in range(15):
            try:
                method = shared if turn % 2 else METHODS[name](model)
                maps = method.attribute(given[index], TARGET)
            except Exception as error:  # noqa: BLE001
                wrong.append(repr(error))
                return
            if not torch.allclose(maps, expected[index], rtol=1e-5, atol=1e-7):
                wrong.append("maps of another image")

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert state(model)["hooks"] == before
