"""One list of methods, open to others, and several methods from one forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import images, tiny

from captum_classemb.attr import (
    METHODS,
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
    attribute_together,
    baselines,
    register_method,
)
from captum_classemb.errors import InputError
from captum_classemb.vit import adapt

PIXELS = images("cls", dtype=torch.float32)


def test_every_method_is_named_once_and_says_what_it_shows() -> None:
    assert list(METHODS)[0] == "patch-importance"
    for name, method in METHODS.items():
        assert method.name == name and method.caption
    assert len({method.build for method in METHODS.values()}) == len(METHODS)
    compared = {name for name, method in METHODS.items() if method.baseline}
    assert compared == {n for n, m in METHODS.items() if m.build.__name__ in baselines.__all__}


def test_a_method_from_outside_is_found(monkeypatch: Any) -> None:
    monkeypatch.setattr("captum_classemb.attr.registry.METHODS", dict(METHODS))
    from captum_classemb.attr import registry

    @register_method("halved", "Half of everything")
    class Halved(PatchImportance):
        pass

    assert registry.METHODS["halved"].build is Halved
    assert registry.METHODS["halved"].build(tiny()).attribute(PIXELS, 1).shape == PIXELS.shape


def test_one_forward_pass_serves_several_methods() -> None:
    vit = adapt(tiny(depth=3))
    methods = [
        PatchImportance(vit),
        MemoryPatchImportance(vit, objective="log_probability"),
        ClassEmbeddingGradient(vit),
        ClassEmbeddingGradient(vit, blocks=[1]),
        ClassEmbeddingProjection(vit),
    ]
    alone = [method.attribute(PIXELS, [1, 2]) for method in methods]
    passes: list[int] = []
    handle = vit.model.register_forward_hook(lambda *_: passes.append(1))
    attribute_together(methods[:3], PIXELS, [1, 2])
    passes.clear()
    attribute_together(methods[:3], PIXELS, [1, 2])
    assert len(passes) == 1
    handle.remove()
    for found, expected in zip(attribute_together(methods, PIXELS, [1, 2]), alone, strict=True):
        torch.testing.assert_close(found, expected)


def test_methods_of_two_models_share_nothing() -> None:
    with pytest.raises(InputError, match="several models"):
        attribute_together([PatchImportance(tiny()), PatchImportance(tiny())], PIXELS, 1)
