"""Users' own changes to a model: wrapped, compiled, adapted, quantised, with another head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from captum_classemb import (
    ClassEmbeddingGradient,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchImportance,
)
from captum_classemb.attr import METHODS
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.hooks import uncompiled
from captum_classemb.vit import adapt

TARGET = 3


def build(**options: Any) -> Any:
    torch.manual_seed(1)
    small = {"num_classes": 10, "depth": 2, "embed_dim": 48, "img_size": 64}
    model = timm.create_model("vit_tiny_patch16_224", **small, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model() -> Any:
    return build()


@pytest.fixture
def expected(model: Any, images: Tensor) -> Tensor:
    return ClassEmbeddingGradient(model).attribute(images, TARGET)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class Twice(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.interpolate(images, scale_factor=2)


def compiled(model: Any) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")
    wrapped(torch.zeros(1, 3, 64, 64))  # hooks set after this call would be ignored
    return wrapped


def checkpointed(model: Any) -> nn.Module:
    model.set_grad_checkpointing(True)
    return model  # type: ignore[no-any-return]


def dropout_head(model: Any) -> nn.Module:
    model.head = nn.Sequential(nn.Dropout(0.1), model.head).eval()
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: nn.Sequential(nn.Identity(), m),
        lambda m: nn.Sequential(nn.Sequential(nn.Identity(), m)),
        nn.DataParallel,
        compiled,
        checkpointed,
        dropout_head,
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.train(),  # nothing random is active
    ],
    ids=[
        "sequential",
        "nested",
        "data_parallel",
        "compiled",
        "checkpointed",
        "dropout_head",
        "channels_last",
        "train_mode",
    ],
)
def test_wrapping_changes_nothing(wrap: Any, model: Any, images: Tensor, expected: Tensor) -> None:
    wrapped = wrap(copy.deepcopy(model))
    assert torch.equal(ClassEmbeddingGradient(wrapped).attribute(images, TARGET), expected)
    ledger = MemoryPatchImportance(wrapped).ledger(images, TARGET)
    assert (ledger.delta.abs() <= 1e-5 * ledger.magnitude).all()


def test_distributed_data_parallel(
    model: Any, images: Tensor, expected: Tensor, tmp_path: Path
) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(ClassEmbeddingGradient(wrapped).attribute(images, TARGET), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_preprocessing_may_resize(model: Any) -> None:
    small = torch.rand(2, 3, 32, 32)
    method = ClassEmbeddingGradient(nn.Sequential(Twice(), model))
    inner = ClassEmbeddingGradient(model)
    assert method.attribute(small, TARGET).shape == small.shape
    found = method.attribute_patches(small, TARGET)
    assert torch.equal(found, inner.attribute_patches(Twice()(small), TARGET))
    # A pixel of the small image stands for the four that are made of it.
    large = nn.functional.avg_pool2d(inner.attribute(Twice()(small), TARGET), 2)
    assert torch.allclose(method.attribute(small, TARGET), 4.0 * large, rtol=1e-4, atol=1e-9)
    outer, bare = (ClassEmbeddingProjection(m.vit, score="probability") for m in (method, inner))
    repeated = nn.functional.avg_pool2d(bare.attribute(Twice()(small), TARGET), 2)
    assert torch.allclose(outer.attribute(small, TARGET), repeated, rtol=1e-4)


def test_lora_weights_are_used_through_their_modules(model: Any, images: Tensor) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["qkv", "proj", "fc2", "head"], r=4, init_lora_weights=False
    )
    # The convolution is named proj too; it stays as it is.
    config.exclude_modules = ["patch_embed.proj"]
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    found = ClassEmbeddingGradient(adapted).attribute(images, TARGET)
    assert distance(found, ClassEmbeddingGradient(merged).attribute(images, TARGET)) < 1e-5
    ledger = MemoryPatchImportance(adapted).ledger(images, TARGET)
    assert (ledger.delta.abs() <= 1e-5 * ledger.magnitude).all()


def test_parametrised_weights(model: Any, images: Tensor, expected: Tensor) -> None:
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    weight_norm(model.blocks[0].attn.proj)
    weight_norm(model.blocks[1].attn.qkv)
    weight_norm(model.head)
    assert distance(ClassEmbeddingGradient(model).attribute(images, TARGET), expected) < 1e-5


def test_quantised_linears(model: Any, images: Tensor, expected: Tensor) -> None:
    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if not engines:
        pytest.skip("this build of torch has no engine for quantised layers")
    quantise = torch.ao.quantization.quantize_dynamic
    quantised = quantise(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert distance(ClassEmbeddingGradient(quantised).attribute(images, TARGET), expected) < 0.1


def test_a_head_with_hidden_layers(model: Any, images: Tensor) -> None:
    model.head = nn.Sequential(nn.Linear(48, 20), nn.GELU(), nn.Linear(20, 10))
    gradient = ClassEmbeddingGradient(model)
    maps = gradient.attribute_classes(images, [TARGET])
    summed = gradient.attribute_patches(images, TARGET).sum((1, 2))
    assert torch.allclose(maps[:, 0], summed, atol=1e-6 * float(summed.abs().max()))
    # Read as the only token, CLS of the last block gives the model's own logits.
    vit = adapt(model)
    tokens = model.forward_features(images)
    assert ClassEmbeddingProjection(model).attribute_classes(images).shape == (2, 10, 4, 4)
    assert tokens.shape[1] == vit.prefix_tokens + 16
    with pytest.raises(UnsupportedModelError, match="no exact ledger"):
        MemoryPatchImportance(model).attribute(images, TARGET)


def test_active_dropout_is_refused() -> None:
    model = build(proj_drop_rate=0.1).train()
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        ClassEmbeddingGradient(model).attribute(torch.zeros(1, 3, 64, 64), TARGET)


def test_a_replaced_forward_is_noticed(model: Any, images: Tensor) -> None:
    attention = model.blocks[0].attn
    original = attention.forward
    attention.forward = lambda x, **options: 2 * original(x)
    with pytest.raises(UnsupportedModelError, match="attention outputs of block 0 differ"):
        ClassEmbeddingGradient(model).attribute(images, TARGET)


def test_changed_weights_are_verified_again(model: Any, images: Tensor) -> None:
    method = ClassEmbeddingGradient(model)
    before = method.attribute(images, TARGET)
    states = set(method.vit.verified)
    method.attribute(images, TARGET)
    assert method.vit.verified == states and len(states) == 1
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.mul_(1.5)
    after = method.attribute(images, TARGET)
    assert method.vit.verified > states
    assert not torch.equal(before, after)


# Half precision against float64: what rounding of the model itself leaves, not of this library,
# which computes in float32 on what it recorded.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
def test_precision(dtype: torch.dtype, tolerance: float, model: Any, images: Tensor) -> None:
    exact = copy.deepcopy(model).double()
    rounded = copy.deepcopy(model).to(dtype)
    for method in (ClassEmbeddingGradient, MemoryPatchImportance):
        reference = method(exact).attribute(images.double(), TARGET)
        found = method(rounded).attribute(images, TARGET)
        assert found.dtype == torch.float32
        assert distance(found.double(), reference) < tolerance


def test_autocast(model: Any, images: Tensor, expected: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = ClassEmbeddingGradient(model).attribute(images, TARGET)
    assert distance(found, expected) < 4e-2


@pytest.mark.parametrize(("size", "grid"), [((48, 80), (3, 5)), ((64, 64), (4, 4))])
def test_dynamic_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = build(dynamic_img_size=True)
    maps = ClassEmbeddingGradient(model).attribute_patches(torch.rand(1, 3, *size), TARGET)
    assert maps.shape == (1, 2, 3, *grid)


def test_padded_sizes() -> None:
    model = build(dynamic_img_size=True, dynamic_img_pad=True)
    images = torch.rand(1, 3, 50, 81)
    method = ClassEmbeddingGradient(model)
    patches = method.attribute_patches(images, TARGET)
    assert patches.shape == (1, 2, 3, 4, 6)
    pixels = method.attribute(images, TARGET)
    assert torch.allclose(pixels.sum(), patches.sum(), rtol=1e-4)
    assert method.vit.feature_mask((50, 81)).unique().numel() == 24


@pytest.mark.parametrize("method", [MemoryPatchImportance, PatchImportance, ClassEmbeddingGradient])
def test_compiled_in_place_after_and_before_use(
    method: Any, model: Any, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Compiled graphs call no hook set later, and are not compiled anew for each."""
    explained = method(model)
    expected = explained.attribute(images, TARGET)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=backend)
    model(images)
    made = len(graphs)
    assert made > 0
    for compiled in (explained, method(model)):
        for _ in range(3):
            assert torch.equal(compiled.attribute(images, TARGET), expected)
    assert len(graphs) == made
    assert "recompile" not in caplog.text
    # The user's own calls are compiled as before.
    torch._dynamo.reset()
    model(images)
    assert len(graphs) > made


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if not m.needs])
def test_deterministic_algorithms(name: str, model: Any, images: Tensor) -> None:
    method = METHODS[name].build(model)
    expected = method.attribute(images, TARGET), method.attribute_classes(images)
    torch.use_deterministic_algorithms(True)
    try:
        found = method.attribute(images, TARGET), method.attribute_classes(images)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))


def test_threads_leave_the_compiler_as_it_was() -> None:
    """Those that come and go in any order: the last one out restores what compiled calls do."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    compiled = torch.compile(nn.Linear(3, 3), backend=backend)
    compiled(torch.zeros(1, 3))
    assert not graphs
    second.__exit__(None, None, None)
    compiled(torch.zeros(1, 3))
    assert len(graphs) == 1
