"""Inputs and targets in every form that Captum's users hand in, and clear refusals of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import build, images, tiny
from oracle import Oracle
from target_forms import ONE_EACH, ONE_FOR_ALL
from torch import Tensor

from captum_classemb import ClassEmbeddingGradient, ClassEmbeddingProjection, MemoryPatchImportance
from captum_classemb.attr._inputs import clamped, forward_args, like_inputs, targets
from captum_classemb.errors import InputError, TargetError
from captum_classemb.vit.checks import Checks


@pytest.mark.parametrize("target", ONE_FOR_ALL.values(), ids=ONE_FOR_ALL)
def test_one_target_for_all(target: Any) -> None:
    assert torch.equal(targets(target, 4, 7), torch.tensor([3, 3, 3, 3]))


@pytest.mark.parametrize("target", ONE_EACH.values(), ids=ONE_EACH)
def test_one_target_for_each(target: Any) -> None:
    assert torch.equal(targets(target, 3, 7), torch.tensor([2, 0, 6]))


@pytest.mark.parametrize("wrong", [7, -1, 2**40])
def test_targets_of_the_device_are_clamped_and_told_at_the_end(wrong: int) -> None:
    checks = Checks("model", 1e-4)
    assert torch.equal(clamped(torch.tensor([[0, 6]]), 7, checks), torch.tensor([[0, 6]]))
    checks.finish()
    found = clamped(torch.tensor([3, wrong, 1]), 7, checks)
    assert found.tolist() == [3, 6 if wrong > 0 else 0, 1]
    with pytest.raises(TargetError, match=f"target {wrong} is out of range: classes are 0 to 6"):
        checks.finish()


def test_no_target() -> None:
    assert torch.equal(targets(None, 2, 1), torch.tensor([0, 0]))
    with pytest.raises(TargetError, match="no target was given: the model has 7 classes"):
        targets(None, 2, 7)


WRONG: dict[str, tuple[Any, str]] = {
    "too high": (7, "target 7 is out of range: classes are 0 to 6"),
    "negative": (-1, "target -1 is out of range"),
    "one of them": ([0, 9, 1], "target 9 is out of range"),
    "too few": ([0, 1], "2 targets were given for 3 images"),
    "too many": (torch.arange(4), "4 targets were given for 3 images"),
    "no tensor entries": (torch.empty(0, dtype=torch.int64), "0 targets were given for 3 images"),
    "empty list": ([], "empty list of targets"),
    "float": (1.0, "target 1.0 is a float"),
    "bool": (True, "target True is a bool"),
    "numpy bool": (np.bool_(True), "a class index is needed"),
    "name": ("cat", "target 'cat' is a str"),
    "float tensor": (torch.tensor([1.0, 2.0, 3.0]), "targets are torch.float32: integers"),
    "bool tensor": (torch.tensor([True, False, True]), "targets are torch.bool: integers"),
    "float array": (np.array([1.0, 2.0, 3.0]), "targets are float64: integers"),
    "array of names": (np.array(["a", "b", "c"]), "targets are <U1: integers"),
    "array of objects": (np.array([1, None, 2]), "targets are object: integers"),
    "list of floats": ([1, 2.0, 3], "target 2.0 is a float"),
    "list of bool tensors": ([torch.tensor(True)] * 3, "a class index is needed"),
    "pair": ((1, 2), r"target \(1, 2\) is a tuple"),
    "list of pairs": ([(1, 2)] * 3, r"target \(1, 2\) is a tuple"),
    "two columns": (torch.zeros(3, 2, dtype=torch.int64), r"shape \(3, 2\): one class index"),
    "set": ({1}, "is a set"),
}


@pytest.mark.parametrize(("target", "message"), WRONG.values(), ids=WRONG)
def test_wrong_targets(target: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        targets(target, 3, 7)
    model = tiny()
    pixels = torch.randn(3, 3, 32, 32)
    for method in (ClassEmbeddingGradient(model), ClassEmbeddingProjection(model)):
        with pytest.raises(TargetError, match=message):
            method.attribute(pixels, target)


@pytest.mark.parametrize("classes", [[7], [-1], [1.5], ["a"], [True], []])
def test_wrong_classes(classes: Any) -> None:
    model = tiny()
    pixels = torch.randn(1, 3, 32, 32)
    for method in (
        ClassEmbeddingGradient(model),
        ClassEmbeddingProjection(model),
        MemoryPatchImportance(model),
    ):
        with pytest.raises(TargetError):
            method.attribute_classes(pixels, classes)


def test_classes_as_tensors_and_arrays() -> None:
    method = ClassEmbeddingProjection(tiny())
    pixels = torch.randn(1, 3, 32, 32)
    expected = method.attribute_classes(pixels, [4, 0])
    for classes in (torch.tensor([4, 0]), np.array([4, 0]), (4, 0), range(4, -1, -4)):
        assert torch.equal(method.attribute_classes(pixels, classes), expected)  # type: ignore[arg-type]


# -- Images

NOT_IMAGES: dict[str, tuple[Any, str]] = {
    "no batch": (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\): a batch of images"),
    "no tensor": (np.zeros((1, 3, 32, 32)), "inputs are a ndarray: a tensor is needed"),
    "nothing": (None, "inputs are a NoneType"),
    "two inputs": ((torch.zeros(1, 3, 32, 32),) * 2, "a tuple of 2 inputs was given"),
    "no inputs": ((), "a tuple of 0 inputs was given"),
    "no images": (torch.zeros(0, 3, 32, 32), "no image was given"),
    "channels": (torch.zeros(1, 1, 32, 32), "inputs have 1 channels: the model takes 3"),
    "size": (torch.zeros(1, 3, 32, 40), "inputs are 32×40 pixels: the model takes 32×32"),
    "NaN": (torch.full((1, 3, 32, 32), float("nan")), "NaN or infinity"),
    "infinity": (torch.full((1, 3, 32, 32), float("-inf")), "NaN or infinity"),
}


@pytest.mark.parametrize(("inputs", "message"), NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_what_is_no_batch_of_images(inputs: Any, message: str) -> None:
    model = tiny()
    for method in (ClassEmbeddingGradient(model), MemoryPatchImportance(model)):
        for run in (method.attribute, method.attribute_patches):
            with pytest.raises(InputError, match=message):
                run(inputs, 1)
        with pytest.raises(InputError, match=message):
            method.attribute_classes(inputs)


def test_images_that_leave_half_precision_are_refused() -> None:
    """1e6 is finite, but not in float16."""
    method = ClassEmbeddingGradient(tiny().half())
    with pytest.raises(InputError, match="NaN or infinity"):
        method.attribute(torch.full((1, 3, 32, 32), 1e6), 1)


def test_a_tuple_of_one_comes_back_as_one() -> None:
    method = ClassEmbeddingGradient(tiny())
    pixels = torch.randn(2, 3, 32, 32)
    plain = method.attribute(pixels, 1)
    assert isinstance(plain, Tensor)
    (tupled,) = method.attribute((pixels,), 1)
    assert torch.equal(plain, tupled)
    assert torch.equal(method.attribute_patches((pixels,), 1), method.attribute_patches(pixels, 1))


def test_attributions_are_detached_and_contiguous() -> None:
    maps = torch.randn(2, 4, 3, requires_grad=True).transpose(1, 2)
    plain = like_inputs(torch.zeros(1), maps)
    assert plain.is_contiguous() and not plain.requires_grad
    (tupled,) = like_inputs((torch.zeros(1),), maps)
    assert torch.equal(plain, tupled)


def test_images_of_another_dtype_are_cast_to_the_models() -> None:
    model = tiny()
    pixels = torch.randn(2, 3, 32, 32)
    method = ClassEmbeddingGradient(model)
    expected = method.attribute(pixels, 1)
    in_double = method.attribute(pixels.double(), 1)
    assert torch.equal(in_double, expected)
    leaf = pixels.clone().requires_grad_(True)
    assert torch.equal(method.attribute(leaf, 1), expected)
    assert leaf.requires_grad and leaf.grad is None


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats(memory_format: torch.memory_format) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    for method in (ClassEmbeddingGradient(tiny()), MemoryPatchImportance(tiny())):
        given = pixels.to(memory_format=memory_format)
        assert torch.allclose(method.attribute(given, 1), method.attribute(pixels, 1))


# -- Further arguments of the model


def test_further_arguments_are_wrapped_as_captum_wraps_them() -> None:
    assert forward_args(None) == ()
    assert forward_args(5) == (5,)
    assert forward_args([5]) == ([5],)
    assert forward_args((5, None)) == (5, None)


@pytest.mark.parametrize("kind", ["one for all", "one each", "additive"])
def test_an_attention_mask_is_heeded(kind: str) -> None:
    """timm's models take one: maps and ledger must be those of the masked model."""
    model, pixels = build("cls"), images("cls")
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 1, 17, 17, generator=generator) > 0.3
    mask = mask | torch.eye(17, dtype=torch.bool)
    given: Tensor = {
        "one for all": mask[:1],
        "one each": mask,
        "additive": torch.randn(1, 1, 17, 17, generator=generator).double(),
    }[kind]
    oracle = Oracle(model, pixels, given)
    target = torch.tensor([1, 4])
    method = ClassEmbeddingGradient(model, objective="log_probability")
    maps = method.attribute_patches(pixels, target, additional_forward_args=given).flatten(3)
    expected = oracle.gradient(target, "log_probability")[..., 1:]
    assert torch.allclose(maps, expected, rtol=1e-9, atol=1e-12)
    memory = MemoryPatchImportance(model)
    ledger = memory.ledger(pixels, target, additional_forward_args=(given,))
    logits = oracle.logits.gather(1, target[:, None])[:, 0]
    assert torch.allclose(ledger.score, logits, rtol=1e-9)
    assert bool((ledger.delta.abs() <= 1e-10 * ledger.magnitude).all())
