"""Models that hold a Vision Transformer: read exactly, or refused with what to type."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from families import randomise, torchvision_vit
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb import ClassEmbeddingGradient, MemoryPatchImportance, PatchImportance
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit import adapt
from captum_classemb.vit.verify import identities

D, CLASSES, TARGET = 24, 5, 3


def vit(classes: int = CLASSES, **options: Any) -> Any:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **{**small, **options})


class Wrapper(nn.Module):
    """``forward`` of the model given, passed through a function."""

    def __init__(self, net: nn.Module, then: Callable[[Any], Any] = lambda y: y) -> None:
        super().__init__()
        self.net, self.then = net, then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.net(x))


class Headed(nn.Module):
    """A backbone and a head of its own, with a function of the features between."""

    def __init__(
        self, backbone: nn.Module, head: nn.Module, between: Callable[[Any], Tensor] = lambda y: y
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.between = backbone, head, between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.between(self.backbone(x)))
        return y


class Cosine(nn.Module):
    """A head whose logits are cosines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class WithFunctions(nn.Module):
    """Two layers with a function between, as a head."""

    def __init__(self, function: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[1](self.function(self.layers[0](x)))
        return y


class Functions(nn.Module):
    """The same, in the model itself."""

    def __init__(self, backbone: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.backbone, self.first, self.second = backbone, first, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.first(self.backbone(x))))
        return y


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.4) / 0.3


class Gray(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 3, 1, 1)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2)


def unpooled(pool: Callable[[Tensor], Tensor], head: nn.Module, **options: Any) -> nn.Module:
    """A backbone of timm that returns its tokens, pooled outside."""
    return Headed(vit(0, global_pool="", **options), head, pool)


def beside(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1)


class Row(NamedTuple):
    """A model, and whether it is affine with its norms frozen (a ledger exists then)."""

    build: Callable[[], nn.Module]
    affine: bool = True
    channels: int = 3
    side: int = 32


def linear(width: int = D) -> nn.Module:
    return nn.Linear(width, CLASSES)


MLP = [nn.Linear(D, 12), nn.GELU(), nn.Linear(12, CLASSES)]
READ = {
    "wrapper": Row(lambda: Wrapper(vit())),
    "wrapper of a wrapper": Row(lambda: Wrapper(nn.Sequential(Wrapper(vit())))),
    "dictionary": Row(lambda: Wrapper(vit(), lambda y: {"loss": None, "logits": y, "x": y[:, :1]})),
    "tuple of one tensor": Row(lambda: Wrapper(vit(), lambda y: (None, y))),
    "normalised": Row(lambda: nn.Sequential(Normalise(), vit())),
    "gray to colour": Row(lambda: nn.Sequential(Gray(), vit()), channels=1),
    "resized": Row(lambda: nn.Sequential(Twice(), vit()), side=16),
    "averaged": Row(lambda: torch.optim.swa_utils.AveragedModel(Wrapper(vit()))),
    "ema v2": Row(lambda: timm.utils.ModelEmaV2(Wrapper(vit()))),
    "ema v3": Row(lambda: timm.utils.ModelEmaV3(vit())),
    "parallel wrapper": Row(lambda: nn.DataParallel(Wrapper(vit()))),
    "wrapper of parallel": Row(lambda: Wrapper(nn.DataParallel(vit()))),
    "sequential head": Row(lambda: nn.Sequential(vit(0), linear())),
    "own head": Row(lambda: Headed(vit(0), linear())),
    "own head, mean": Row(lambda: Headed(vit(0, global_pool="avg"), linear())),
    "own head, attention pool": Row(lambda: Headed(vit(0, global_pool="map"), linear())),
    "own head on logits": Row(lambda: Headed(vit(7), nn.Linear(7, CLASSES))),
    "dropout": Row(lambda: Headed(vit(0), nn.Sequential(nn.Dropout(0.3), linear()))),
    "batch norm": Row(lambda: Headed(vit(0), nn.Sequential(nn.BatchNorm1d(D), linear()))),
    "batch norm at the end": Row(
        lambda: Headed(vit(0), nn.Sequential(linear(), nn.BatchNorm1d(CLASSES)))
    ),
    "layer norm": Row(lambda: Headed(vit(0), nn.Sequential(nn.LayerNorm(D), linear()))),
    "layer norm between": Row(
        lambda: Headed(
            vit(0, global_pool="avg"),
            nn.Sequential(nn.Linear(D, 12), nn.LayerNorm(12), nn.Linear(12, CLASSES)),
        )
    ),
    "mlp": Row(lambda: Headed(vit(0), nn.Sequential(*copy.deepcopy(MLP))), affine=False),
    "cosine": Row(lambda: Headed(vit(0), Cosine(D)), affine=False),
    "cls beside the mean patch": Row(lambda: unpooled(beside, linear(2 * D))),
    "cls beside the mean patch, batch norm": Row(
        lambda: unpooled(beside, nn.Sequential(nn.BatchNorm1d(2 * D), linear(2 * D)))
    ),
    "cls of the tokens": Row(lambda: unpooled(lambda t: t[:, 0], linear())),
    "a register": Row(lambda: unpooled(lambda t: t[:, 2], linear(), reg_tokens=2)),
    "mean of all": Row(lambda: unpooled(lambda t: t.mean(1), linear())),
    "mean of patches": Row(lambda: unpooled(lambda t: t[:, 1:].mean(1), linear())),
    "mean of patches, no norm": Row(
        lambda: unpooled(lambda t: t[:, 1:].mean(1), linear(), final_norm=False)
    ),
    "functions between layers": Row(
        lambda: Headed(vit(0), WithFunctions(F.gelu, nn.Linear(D, 12), linear(12))), affine=False
    ),
    "functions in a model": Row(
        lambda: Functions(vit(0), nn.Linear(D, 12), linear(12)), affine=False
    ),
    "torchvision, linear": Row(lambda: tv(linear())),
    "torchvision, dropout": Row(lambda: tv(nn.Sequential(nn.Dropout(0.2), linear()))),
    "torchvision, mlp": Row(lambda: tv(nn.Sequential(*copy.deepcopy(MLP))), affine=False),
    "torchvision, none": Row(lambda: Headed(tv(nn.Identity()), linear())),
}


def tv(head: nn.Module) -> nn.Module:
    model: Any = torchvision_vit()
    model.heads = head
    return model  # type: ignore[no-any-return]


def built(build: Callable[[], nn.Module]) -> nn.Module:
    model = build().double().eval()
    randomise(model)
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def pixels(row: Row) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, row.channels, row.side, row.side, generator=generator).double()


def logits(model: Any, images: Tensor) -> Tensor:
    output = getattr(model, "module", model)(images)
    if isinstance(output, dict):
        output = output["logits"]
    output = output[1] if isinstance(output, tuple) else output
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("name", READ)
def test_it_is_read_exactly(name: str) -> None:
    row = READ[name]
    model, images = built(row.build), pixels(row)
    vit_ = adapt(model)
    with torch.no_grad():
        expected = logits(model, images)
        assert torch.equal(vit_(images), expected)
    assert vit_.num_classes == CLASSES
    assert max(identities(vit_, images).values()) < 1e-12
    for method in (PatchImportance, ClassEmbeddingGradient):
        maps = method(model)
        every = maps.attribute_classes(images)
        one = maps.attribute_patches(images, TARGET).sum((1, 2))
        assert torch.allclose(every[:, TARGET], one, rtol=1e-9, atol=1e-12)
        assert maps.attribute(images, TARGET).shape == images.shape
    memory = MemoryPatchImportance(model)
    if row.affine:
        ledger = memory.ledger(images, TARGET)
        assert torch.allclose(ledger.score, expected[:, TARGET], rtol=1e-10)
        assert (ledger.delta.abs() <= 1e-12 * ledger.magnitude).all()
    else:
        with pytest.raises(UnsupportedModelError, match="no exact ledger"):
            memory.attribute(images, TARGET)


@pytest.mark.parametrize("name", READ)
def test_derivatives_of_the_readout_are_those_of_the_model(name: str) -> None:
    row = READ[name]
    model, images = built(row.build), pixels(row)
    vit_ = adapt(model)
    rows: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        rows.append(output.detach().requires_grad_(True))
        return rows[-1]

    handle = vit_.blocks[-1].module.register_forward_hook(keep)
    scores = logits(model, images)
    handle.remove()
    (expected,) = torch.autograd.grad(scores[:, TARGET].sum(), rows[-1])
    g = F.one_hot(torch.tensor([TARGET]), CLASSES).double().expand(2, 1, -1)
    reads = vit_.readout.reads
    found = torch.zeros_like(expected)
    found[:, reads] = vit_.readout.vjp(rows[-1].detach()[:, reads], g)[:, :, 0]
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("tail", "function"),
    [
        (nn.Softmax(-1), lambda y: y.softmax(-1)),
        (nn.Sigmoid(), lambda y: y.sigmoid()),
        (nn.LogSoftmax(-1), lambda y: y.log_softmax(-1)),
    ],
)
@pytest.mark.parametrize("inner", [vit, lambda: Headed(vit(0), linear())])
def test_probabilities_are_explained_by_their_logits(tail: Any, function: Any, inner: Any) -> None:
    bare, images = built(inner), pixels(READ["wrapper"])
    expected = PatchImportance(bare).attribute(images, TARGET)
    for model in (nn.Sequential(bare, tail), Wrapper(bare, function)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = adapt(model)
        assert ["logits before them" in str(w.message) for w in said] == [True]
        assert torch.equal(found(images), bare(images))
        assert torch.equal(PatchImportance(found).attribute(images, TARGET), expected)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: Headed(vit(0), linear(), lambda y: F.normalize(y, dim=-1)),
            r"pass `model\.backbone` and `readout=`",
        ),
        (lambda: Wrapper(vit(), lambda y: 2 * y), r"pass `model\.net`"),
        (lambda: Wrapper(nn.Sequential(vit()), lambda y: y[:, :2]), r"pass `model\.net\.0`"),
        (
            lambda: nn.ModuleDict({"a": vit(), "b": vit()}),
            r"pass one of `model\.a`, `model\.b`",
        ),
        (lambda: Wrapper(vit(), lambda y: {"a": y, "b": y}), "under the name 'logits'"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "register_adapter"),
    ],
)
def test_what_is_not_found_is_refused_with_what_to_pass(build: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        adapt(built(build))


def test_one_logit_may_be_squeezed() -> None:
    model, images = built(lambda: Wrapper(vit(1), lambda y: y.squeeze(1))), pixels(READ["wrapper"])
    found = adapt(model)
    assert torch.equal(found(images)[:, 0], model(images))
    inner: Any = model
    expected = PatchImportance(inner.net).attribute(images)
    assert torch.equal(PatchImportance(model).attribute(images), expected)


def test_a_model_called_twice_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vit()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x) + self.net(x.flip(-1))
            return y

    with pytest.raises(UnsupportedModelError, match="2 times"):
        adapt(built(Both))


def test_a_model_in_train_mode_is_not_called() -> None:
    model = Headed(vit(0), nn.Sequential(nn.BatchNorm1d(D), linear())).train()
    before = model.head[0].running_mean.clone()  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        adapt(model)
    assert torch.equal(model.head[0].running_mean, before)  # type: ignore[index, union-attr]


@pytest.mark.parametrize(("width", "pool"), [(D, lambda t: t[:, 0]), (2 * D, beside)])
@pytest.mark.parametrize(
    "head", [lambda w: linear(w), lambda w: nn.Sequential(nn.BatchNorm1d(w), linear(w))]
)
def test_a_module_as_readout(width: int, pool: Any, head: Any) -> None:
    readout = head(width)
    whole = built(lambda: unpooled(pool, readout))
    bare: Any = whole.backbone
    images = pixels(READ["wrapper"])
    for method in (PatchImportance, ClassEmbeddingGradient, MemoryPatchImportance):
        found = method(bare, readout=readout).attribute_classes(images)
        expected = method(whole).attribute_classes(images)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_module_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"width 24, or 48 for CLS beside the mean patch"):
        PatchImportance(vit(0), readout=nn.Linear(30, 2))
    with pytest.raises(InputError, match="a Readout or a module"):
        PatchImportance(vit(0), readout="head")  # type: ignore[arg-type]


def test_a_headless_model_asks_for_a_readout() -> None:
    with pytest.raises(UnsupportedModelError, match="readout="):
        PatchImportance(Wrapper(vit(0)))


def test_of_a_wrapper_the_wrong_size_is_refused_as_of_the_model() -> None:
    with pytest.raises(InputError, match="the model takes 32×32"):
        PatchImportance(Wrapper(vit()).eval()).attribute(torch.zeros(1, 3, 48, 48), TARGET)


# -- The model itself changed


def compiled_blocks(model: Any) -> Any:
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def assigned_blocks(model: Any) -> Any:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def checkpointed(model: Any) -> Any:
    model.set_grad_checkpointing(True)
    return model.train()


@pytest.mark.parametrize(
    "change",
    [
        compiled_blocks,
        assigned_blocks,
        compiled_in_place,
        checkpointed,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: Wrapper(torch.compile(m, backend="eager")),
    ],
)
def test_compiled_and_checkpointed_models(change: Any) -> None:
    model, images = built(vit), pixels(READ["wrapper"])
    expected = PatchImportance(model).attribute(images, TARGET)
    changed = change(copy.deepcopy(model))
    with torch.no_grad():
        changed(images)  # hooks set after this call would be ignored
    assert torch.equal(PatchImportance(changed).attribute(images, TARGET), expected)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_pruned_head_is_a_head_that_writes_nothing(pool: str) -> None:
    model = built(lambda: vit(depth=3, global_pool=pool))
    images = pixels(READ["wrapper"])
    whole: Any = copy.deepcopy(model)
    keep = [i for i in range(D) if i // 8 != 1]
    attention: Any = model.blocks[1].attn  # type: ignore[index, union-attr]
    with torch.no_grad():
        whole.blocks[1].attn.proj.weight[:, 8:16] = 0.0
        rows = [k * D + i for k in range(3) for i in keep]
        qkv, proj = nn.Linear(D, 48).double(), nn.Linear(16, D).double()
        qkv.weight.copy_(attention.qkv.weight[rows])
        qkv.bias.copy_(attention.qkv.bias[rows])
        proj.weight.copy_(attention.proj.weight[:, keep])
        proj.bias.copy_(attention.proj.bias)
    attention.qkv, attention.proj, attention.num_heads, attention.attn_dim = qkv, proj, 2, 16
    for method in (PatchImportance, ClassEmbeddingGradient, MemoryPatchImportance):
        pruned, full = method(model), method(whole)
        one = pruned.attribute(images, TARGET)
        assert torch.allclose(one, full.attribute(images, TARGET), rtol=1e-9, atol=1e-12)
        every = pruned.attribute_classes(images)
        assert torch.allclose(every, full.attribute_classes(images), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 12])
def test_a_stem_for_other_channels(channels: int) -> None:
    def build() -> nn.Module:
        model = vit()
        model.patch_embed.proj = nn.Conv2d(channels, D, 8, 8)
        return model  # type: ignore[no-any-return]

    images = pixels(Row(build, channels=channels))
    assert PatchImportance(built(build)).attribute(images, TARGET).shape == images.shape


def test_distilled_heads_behind_dropout() -> None:
    model = built(
        lambda: timm.models.deit.VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=D, depth=2, num_heads=3, num_classes=CLASSES
        )
    )
    images, changed = pixels(READ["wrapper"]), copy.deepcopy(model)
    for name in ("head", "head_dist"):
        setattr(changed, name, nn.Sequential(nn.Dropout(0.2), getattr(changed, name)).eval())
    expected = PatchImportance(model).attribute(images, TARGET)
    assert torch.equal(PatchImportance(changed).attribute(images, TARGET), expected)
