"""What an adapter says of a model is what the model computes, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from cases import Case, case
from families import (
    CLASSES,
    FAMILIES,
    PARALLEL,
    SIZES,
    build,
    images,
    randomise,
    tiny,
)
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout import OutputPath
from captum_classemb.vit import ViT, adapt, record, register_adapter
from captum_classemb.vit.record import ALL


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def close(one: Any, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_it_returns_the_models_own_logits(family: str) -> None:
    known = case(family)
    vit = known.vit
    with torch.no_grad():
        assert torch.equal(vit(known.images), known.oracle.logits)
    assert vit.num_classes == CLASSES
    assert adapt(vit) is vit


def test_tokens_are_prefix_and_grid(family: str) -> None:
    known = case(family)
    vit = known.vit
    channels, height, width = SIZES.get(family, (3, 32, 32))
    patch = (12, 8) if family == "non-square" else (8, 8)
    h, w = vit.grid((height, width))
    assert (h, w) == (-(-height // patch[0]), -(-width // patch[1]))
    assert vit.patch_size == patch
    assert vit.prefix_tokens == known.oracle.anatomy.prefix
    assert known.oracle.trace.final.shape[1] == vit.prefix_tokens + h * w
    assert vit.channels == channels


def test_sites_of_the_residual_stream(family: str) -> None:
    known = case(family)
    trace = known.oracle.trace
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post", "embedding", "final"]
    rec = record(known.vit, known.images, names)
    assert torch.equal(rec.logits, known.oracle.logits)
    for b in range(len(trace.branch)):
        pre, post = rec["resid_pre"][b], rec["resid_post"][b]
        assert close(pre, trace.resid_pre[b])
        assert close(rec["attn_out"][b], trace.branch[b])
        assert close(rec["mlp_out"][b], trace.mlp_branch[b])
        assert close(post, trace.resid_post[b])
        assert close(post, pre + rec["attn_out"][b] + rec["mlp_out"][b])
    assert torch.equal(rec["embedding"][0], rec["resid_pre"][0])
    assert torch.equal(rec["final"][0], rec["resid_post"][-1])


def test_between_attention_and_mlp(family: str) -> None:
    known = case(family)
    vit = known.vit
    if family in PARALLEL:
        with pytest.raises(InputError, match="resid_mid does not exist in a parallel block"):
            record(vit, known.images, ["resid_mid"])
        return
    rec = record(vit, known.images, ["resid_mid"])
    for b, mid in enumerate(rec["resid_mid"]):
        trace = known.oracle.trace
        assert close(mid, trace.resid_pre[b] + trace.branch[b])


def test_memories_of_attention(family: str) -> None:
    known = case(family)
    vit, trace = known.vit, known.oracle.trace
    reads = vit.readout.reads
    sites = {"values": ALL, "attention": ALL, "attn_path": reads}
    rec = record(vit, known.images, sites)
    few = record(vit, known.images, {"attention": reads})
    for b in range(len(trace.attention)):
        assert close(torch.cat(rec["values"][b], 1), trace.values[b])
        assert close(torch.cat(rec["attention"][b], 1), trace.attention[b])
        assert close(torch.cat(few["attention"][b], 1), trace.attention[b][:, :, reads])
        paths, rebuilt = rec["attn_path"][b], []
        for path, mixed in zip(paths, known.oracle.mixed(b).chunk(len(paths), 1), strict=True):
            rows = mixed.transpose(1, 2).flatten(2)[:, reads]
            rebuilt.append(OutputPath.of(path.steps, rows).output)
        assert close(sum(rebuilt), trace.branch[b][:, reads])
        assert close(sum(path.output for path in paths), trace.branch[b][:, reads])


def test_coefficients_are_what_enters_the_last_linear_layers(family: str) -> None:
    known = case(family)
    vit, trace = known.vit, known.oracle.trace
    rec = record(vit, known.images, ["mlp_coefficients", "mlp_path"])
    for b in range(len(trace.coefficients)):
        memories = rec["mlp_coefficients"][b]
        assert close(torch.cat(memories, -1), trace.coefficients[b])
        pairs = zip(rec["mlp_path"][b], memories, strict=True)
        assert close(sum(OutputPath.of(p.steps, m).output for p, m in pairs), trace.mlp_branch[b])
        coefficients = record(vit, known.images, ["attn_coefficients"])["attn_coefficients"][b]
        assert close(torch.cat(coefficients, -1), trace.attn_coefficients[b])


def test_the_readout_of_the_last_tokens_gives_the_logits(family: str) -> None:
    known = case(family)
    vit, trace = known.vit, known.oracle.trace
    final = trace.final
    assert close(vit.readout(final[:, vit.readout.reads]), trace.logits)
    projected = vit.readout.project(final)
    assert projected.shape == (*final.shape[:2], CLASSES)
    # A token read alone is what the model makes of an image of such tokens only.
    if family != "distilled":
        for n in (0, 3, final.shape[1] - 1):
            alone = known.oracle.anatomy.read(final[:, n : n + 1].expand_as(final))
            assert close(projected[:, n], alone)


def test_the_readout_adds_no_parameters(family: str) -> None:
    known = case(family)
    vit = known.vit
    own = {id(parameter) for parameter in known.model.parameters()}
    assert {id(parameter) for parameter in vit.parameters()} == own
    assert set(vit.state_dict()) == {f"model.{key}" for key in known.model.state_dict()}


# -- Input


def test_wrong_images_are_refused_by_size_and_channels() -> None:
    vit = adapt(tiny())
    vit.check_inputs(torch.zeros(2, 3, 32, 32))
    wrong = {
        "a batch of images": torch.zeros(3, 32, 32),
        "4 channels: the model takes 3": torch.zeros(1, 4, 32, 32),
        "24×32 pixels: the model takes 32×32": torch.zeros(1, 3, 24, 32),
        "NaN or infinity": torch.full((1, 3, 32, 32), float("nan")),
    }
    for message, pixels in wrong.items():
        with pytest.raises(InputError, match=message):
            vit.check_inputs(pixels)


def test_a_model_of_any_size_refuses_what_its_patches_do_not_divide() -> None:
    vit = adapt(build("dynamic size", torch.float32))
    vit.check_inputs(torch.zeros(1, 3, 48, 16))
    assert vit.grid((48, 16)) == (6, 2)
    with pytest.raises(InputError, match="30×32"):
        vit.check_inputs(torch.zeros(1, 3, 30, 32))
    adapt(build("padded", torch.float32)).check_inputs(torch.zeros(1, 3, 30, 32))


# -- Refusals


def swin() -> nn.Module:
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=12,
        depths=(1, 1),
        num_heads=(1, 2),
    )
    return model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: timm.create_model("resnet10t"), "ResNet"),
        (swin, "SwinTransformer"),
        (lambda: nn.Linear(3, 2), "Linear"),
    ],
)
def test_what_is_no_plain_vit_is_refused_by_name(model: Any, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=name) as caught:
        adapt(model())
    assert "vision transformer" in str(caught.value).lower(), "it says what is supported"


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="function was given"):
        adapt(lambda x: x)  # type: ignore[arg-type]


def test_a_model_without_classifier() -> None:
    vit = adapt(tiny(num_classes=0))
    assert not vit.has_readout
    with pytest.raises(UnsupportedModelError, match=r"num_classes=0.*readout="):
        _ = vit.readout


class MyBlock(Block):
    """A block that does something else."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(x)
        return 2 * out


MyBlock.__name__ = "Block"


def test_a_block_that_bears_a_known_name_is_not_trusted() -> None:
    with pytest.raises(UnsupportedModelError, match="Block are not supported|blocks of type"):
        adapt(tiny(block_fn=MyBlock))


class Subclass(VisionTransformer):
    """A user's own class on top of timm's."""


def test_subclasses_are_adapted_as_their_base() -> None:
    model = randomise(Subclass(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
    assert len(adapt(model.eval()).blocks) == 2


class Foreign(nn.Module):
    """A user's model around a supported one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_users_register_an_adapter() -> None:
    from captum_classemb.vit import adapt as adapt_function

    name = f"{Foreign.__module__}.{Foreign.__qualname__}"
    read: list[nn.Module] = []

    @register_adapter(name)
    def adapter(model: nn.Module) -> ViT:
        foreign: Any = model
        read.append(foreign)
        return adapt_function(foreign.inner)

    model = Foreign().eval()
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(adapt_function(model)(pixels), model(pixels))
    assert read == [model]


def test_cases_are_what_they_claim() -> None:
    """Every parameter is drawn at random, so that no branch, bias or scale can vanish."""
    for name in FAMILIES:
        for key, parameter in build(name).named_parameters():
            assert parameter.std() > 0.05 or parameter.numel() == 1, f"{name}: {key}"
        known: Case = case(name)
        assert known.oracle.trace.logits.std() > 1e-2
        assert images(name).dtype == torch.float64
