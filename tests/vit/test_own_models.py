"""Vision Transformers around ``nn.TransformerEncoder``, and vit_pytorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb import ClassEmbeddingGradient, MemoryPatchImportance, PatchImportance
from captum_classemb.attr.baselines import CheferRelevance, TokenOcclusion
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.vit import adapt
from captum_classemb.vit.verify import identities

D, CLASSES, TARGET = 24, 5, 3


class Own(nn.Module):
    """A Vision Transformer as one writes it around ``nn.TransformerEncoder``.

    Args:
        pool: ``"cls"``, ``"mean"`` (of patches, without a class token) or ``"both"``.
        unfold: embed patches by a linear layer on unfolded pixels, not by a convolution.
        norm: where the last norm is: ``"encoder"``, ``"after"`` the pool, or none.
        size: the image size of the learnt positions.
    """

    def __init__(
        self,
        pool: str = "cls",
        unfold: bool = False,
        norm: str = "encoder",
        size: int = 40,
        channels: int = 3,
        **options: Any,
    ) -> None:
        super().__init__()
        settings = {"dim_feedforward": 48, "batch_first": True, "norm_first": True, **options}
        layer = nn.TransformerEncoderLayer(D, 3, **settings)
        self.pool, self.unfold = pool, unfold
        if unfold:
            self.embed: nn.Module = nn.Linear(64 * channels, D)
        else:
            self.embed = nn.Conv2d(channels, D, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, pool != "mean", D))
        self.positions = nn.Parameter(torch.zeros(1, (size // 8) ** 2 + self.cls.shape[1], D))
        last = nn.LayerNorm(D) if norm == "encoder" else None
        self.encoder = nn.TransformerEncoder(layer, 2, norm=last, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(D) if norm == "after" else nn.Identity()
        self.head = nn.Linear(2 * D if pool == "both" else D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.unfold:
            tokens = self.embed(F.unfold(x, 8, stride=8).transpose(1, 2))
        else:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.positions
        tokens = self.encoder(tokens)
        if self.pool == "both":
            pooled = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1)
        else:
            pooled = tokens[:, 0] if self.pool == "cls" else tokens.mean(1)
        y: Tensor = self.head(self.norm(pooled))
        return y


def of_vit_pytorch(kind: str, **options: Any) -> nn.Module:
    vit_pytorch = pytest.importorskip("vit_pytorch")
    settings = {"image_size": 40, "patch_size": 8, "num_classes": CLASSES, "dim": D, "depth": 3}
    settings |= {"heads": 3, "mlp_dim": 48, "dim_head": 8, **options}
    model: nn.Module = getattr(vit_pytorch, kind)(**settings)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cls": Own,
    "mean": lambda: Own("mean"),
    "cls beside the mean patch": lambda: Own("both"),
    "norm after the pool": lambda: Own("mean", norm="after"),
    "no last norm": lambda: Own(norm="none"),
    "unfolded": lambda: Own(unfold=True),
    "gelu": lambda: Own(activation="gelu", bias=False),
    "one channel": lambda: Own(channels=1),
    "vit_pytorch, cls": lambda: of_vit_pytorch("ViT"),
    "vit_pytorch, mean": lambda: of_vit_pytorch("ViT", pool="mean"),
    "vit_pytorch, wide heads": lambda: of_vit_pytorch("ViT", dim_head=16),
    "vit_pytorch, simple": lambda: of_vit_pytorch("SimpleViT"),
    "vit_pytorch, wrapped": lambda: nn.Sequential(nn.Identity(), of_vit_pytorch("ViT")),
}


def built(name: str) -> Any:
    model = MODELS[name]().double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def images(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 1 if "one" in name else 3, 40, 40, generator=generator).double()


@pytest.mark.parametrize("name", MODELS)
def test_it_is_read_exactly(name: str) -> None:
    model, pixels = built(name), images(name)
    vit = adapt(model)
    with torch.no_grad():
        expected = model(pixels)
        # The fused kernel of torch rounds elsewhere.
        assert torch.allclose(vit(pixels), expected, rtol=1e-12, atol=1e-13)
    assert vit.grid((40, 40)) == (5, 5) and vit.patch_size == (8, 8)
    assert max(identities(vit, pixels).values()) < 1e-12
    ledger = MemoryPatchImportance(model).ledger(pixels, TARGET)
    assert torch.allclose(ledger.score, expected[:, TARGET], rtol=1e-10)
    assert (ledger.delta.abs() <= 1e-12 * ledger.magnitude).all()
    for method in (PatchImportance, ClassEmbeddingGradient):
        maps = method(model)
        every = maps.attribute_classes(pixels)
        one = maps.attribute_patches(pixels, TARGET).sum((1, 2))
        assert every.shape == (2, CLASSES, 5, 5)
        assert torch.allclose(every[:, TARGET], one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_patch_without_which_the_logit_changes(name: str) -> None:
    """Occlusion runs the blocks again, on fewer tokens: against the model's own blocks."""
    model, pixels = built(name), images(name)[:1]
    vit = adapt(model)
    entered: list[Tensor] = []
    handle = vit.blocks[0].module.register_forward_pre_hook(
        lambda module, args: entered.append(args[0].detach())
    )
    whole = model(pixels)
    handle.remove()
    tokens = entered[0]
    left = torch.cat([tokens[:, : vit.prefix_tokens + 7], tokens[:, vit.prefix_tokens + 8 :]], 1)
    with torch.no_grad():
        for block in vit.blocks:
            left = block.module(left)
        expected = whole - vit.readout(left[:, vit.readout.reads])
    maps = TokenOcclusion(model).attribute_patches(pixels, TARGET)
    assert torch.allclose(maps.flatten()[7], expected[0, TARGET], rtol=1e-9)


@pytest.mark.parametrize("name", ["cls", "vit_pytorch, cls"])
def test_hooks_between_blocks_see_attention(name: str) -> None:
    """Chefer's relevance has a gradient at every block's attention."""
    model, pixels = built(name), images(name)
    maps = CheferRelevance(model).attribute_patches(pixels, TARGET)
    assert (maps > 0).any() and maps.isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"norm_first": False}, "norm_first=True"), ({"batch_first": False}, "batch_first=True")],
)
def test_layers_that_are_no_sum_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        adapt(Own(**options).eval())


def test_padding_masks_are_refused() -> None:
    class Masked(Own):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
            mask[:, -1] = True
            tokens = self.encoder(tokens, src_key_padding_mask=mask)
            y: Tensor = self.head(tokens.mean(1))
            return y

    with pytest.raises(UnsupportedModelError, match="masks that leave tokens out"):
        PatchImportance(Masked("mean").eval()).attribute(torch.rand(1, 3, 40, 40), TARGET)


def test_the_size_of_learnt_positions_is_asked_for() -> None:
    with pytest.raises(InputError, match="the model takes 40×40"):
        PatchImportance(Own().eval()).attribute(torch.rand(1, 3, 32, 32), TARGET)


def test_an_encoder_of_no_patches_is_refused() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(96, 3, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(96, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.encoder(x.transpose(1, 2).flatten(2)).mean(1))
            return y

    with pytest.raises(UnsupportedModelError, match="token of each patch"):
        adapt(Rows().eval())
