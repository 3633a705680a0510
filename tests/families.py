"""Small models of every supported family, each parameter drawn at random.

At a library's own initial values biases are 0, norms are the identity and LayerScale is nearly 0,
so that a forgotten term would pass unseen. A new family is one entry of :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm, SimpleNorm
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import (
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

CLASSES = 7
SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": CLASSES,
}


def _timm(**options: Any) -> nn.Module:
    model: nn.Module = VisionTransformer(**{**SMALL, **options})
    return model


def _other(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return kind(**{**SMALL, **options})


def _naflex(**options: Any) -> nn.Module:
    settings = {k: v for k, v in SMALL.items() if k != "num_classes"}
    del settings["img_size"]
    model: nn.Module = NaFlexVit(
        num_classes=CLASSES, pos_embed_grid_size=(4, 4), **settings, **options
    )
    return model


def _gated(**options: Any) -> nn.Module:
    """timm's attention can be gated, but no option of its ``VisionTransformer`` says so."""
    model: Any = _timm(**options)
    for block in model.blocks:
        block.attn.gate = nn.Linear(SMALL["embed_dim"], block.attn.attn_dim)
    return model  # type: ignore[no-any-return]


def _with_head(*layers: nn.Module, **options: Any) -> nn.Module:
    model: Any = _timm(**options)
    model.head = nn.Sequential(*layers)
    return model  # type: ignore[no-any-return]


def _dropout_head() -> nn.Module:
    return _with_head(nn.Dropout(0.5), nn.Linear(24, CLASSES))


def _mlp_head() -> nn.Module:
    return _with_head(
        nn.Linear(24, 12), nn.GELU(), nn.Linear(12, CLASSES), global_pool="avg", fc_norm=False
    )


def _distilled() -> nn.Module:
    return VisionTransformerDistilled(**SMALL)


def torchvision_vit(num_classes: int = CLASSES) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    model: nn.Module = models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=3,
        hidden_dim=24,
        mlp_dim=48,
        num_classes=num_classes,
    )
    return model


def _huggingface(attention: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
        **options,
    )
    config._attn_implementation = attention
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


class _Louder(nn.Module):
    """Two patches whose tokens stand far above the others."""

    def __init__(self, tokens: int, sinks: Sequence[int]) -> None:
        super().__init__()
        more = torch.zeros(1, tokens, SMALL["embed_dim"])
        signs = torch.arange(SMALL["embed_dim"]) % 3 - 1.0
        more[:, list(sinks)] = 30.0 * signs
        self.register_buffer("more", more)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.more


def _with_sinks(**options: Any) -> nn.Module:
    model: Any = _timm(**options)
    model.pos_drop = _Louder(model.pos_embed.shape[1], (4, 10))
    return model  # type: ignore[no-any-return]


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "cls": _timm,
    "cls, with sinks": _with_sinks,
    "cls, fc_norm": partial(_timm, fc_norm=True),
    "cls, no last norm": partial(_timm, final_norm=False),
    "cls, norm before the blocks": partial(_timm, pre_norm=True),
    "cls, no biases": partial(_timm, qkv_bias=False, proj_bias=False),
    "mean, fc_norm": partial(_timm, global_pool="avg"),
    "mean, with sinks": partial(_with_sinks, global_pool="avg"),
    "mean, norm first": partial(_timm, global_pool="avg", fc_norm=False),
    "mean, no cls": partial(_timm, global_pool="avg", class_token=False),
    "mean with prefix tokens": partial(_timm, global_pool="avg", pool_include_prefix=True),
    "registers": partial(_timm, reg_tokens=2, no_embed_class=True),
    "mean, registers": partial(_timm, reg_tokens=2, global_pool="avg", fc_norm=False),
    "layer scale": partial(_timm, init_values=0.1),
    "mean, layer scale": partial(_timm, init_values=0.1, global_pool="avg", fc_norm=False),
    "post-norm": partial(_timm, block_fn=ResPostBlock),
    "mean, post-norm": partial(_timm, block_fn=ResPostBlock, global_pool="avg", fc_norm=False),
    "q and k norm": partial(_timm, qk_norm=True),
    "norm before W_O": partial(_timm, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.1),
    "gate before W_O": _gated,
    "mean, norm and gate": partial(_gated, scale_attn_norm=True, global_pool="avg", fc_norm=False),
    "rms norm": partial(_timm, norm_layer=RmsNorm),
    "mean, rms norm": partial(_timm, norm_layer=RmsNorm, global_pool="avg", fc_norm=False),
    "simple norm": partial(_timm, norm_layer=SimpleNorm),
    "mean, simple norm": partial(_timm, norm_layer=SimpleNorm, global_pool="avg", fc_norm=False),
    "dynamic size": partial(_timm, dynamic_img_size=True),
    "padded": partial(_timm, dynamic_img_size=True, dynamic_img_pad=True),
    "non-square": partial(_timm, img_size=(24, 40), patch_size=(12, 8)),
    "one channel": partial(_timm, in_chans=1),
    "max pooling": partial(_timm, global_pool="max"),
    "dropout before the head": _dropout_head,
    "mlp head": _mlp_head,
    "attention pooling": partial(_timm, global_pool="map", class_token=False),
    "attention pooling, norm and registers": partial(
        _timm, global_pool="map", reg_tokens=2, qk_norm=True, init_values=0.1
    ),
    "distilled": _distilled,
    "parallel scaling": partial(_timm, block_fn=ParallelScalingBlock, init_values=0.1),
    "parallel scaling, mean": partial(
        _timm, block_fn=ParallelScalingBlock, global_pool="avg", fc_norm=False, norm_layer=RmsNorm
    ),
    "parallel scaling, split W_O": partial(
        _timm, block_fn=partial(ParallelScalingBlock, fuse_out_proj=False), qkv_bias=False
    ),
    "parallel modules": partial(_timm, block_fn=ParallelThingsBlock, init_values=0.1),
    "parallel modules, mean": partial(
        _timm, block_fn=ParallelThingsBlock, global_pool="avg", fc_norm=False
    ),
    "differential": partial(_timm, attn_layer="diff", num_heads=3, scale_attn_norm=True),
    "differential, mean": partial(_timm, attn_layer="diff", global_pool="avg", fc_norm=False),
    "differential, parallel": partial(
        _timm, block_fn=DiffParallelScalingBlock, init_values=0.1, global_pool="avg"
    ),
    "eva": partial(_other, Eva),
    "eva, rotary and gated MLP": partial(
        _other,
        Eva,
        use_rot_pos_emb=True,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        qkv_fused=False,
        init_values=0.1,
        global_pool="avg",
        num_reg_tokens=2,
    ),
    "eva, rotary attention": partial(
        _other, Eva, attn_type="rope", use_rot_pos_emb=True, qk_norm=True, use_fc_norm=False
    ),
    "eva, shared keys and values": partial(
        _other,
        Eva,
        attn_type="rope",
        use_rot_pos_emb=True,
        num_kv_heads=1,
        qkv_fused=False,
        swiglu_mlp=True,
    ),
    "eva, post-norm": partial(_other, Eva, use_post_norm=True, use_abs_pos_emb=True),
    "beit": partial(_other, Beit, use_rel_pos_bias=True, init_values=0.1, qkv_bias=True),
    "beit, shared positions": partial(
        _other, Beit, use_shared_rel_pos_bias=True, global_pool="token", swiglu_mlp=True
    ),
    "relative positions": partial(
        _other, VisionTransformerRelPos, class_token=True, global_pool="token", init_values=0.1
    ),
    "relative positions, post-norm": partial(
        _other, VisionTransformerRelPos, block_fn=ResPostRelPosBlock, rel_pos_type="bias"
    ),
    "relative positions, shared": partial(
        _other, VisionTransformerRelPos, shared_rel_pos=True, rel_pos_dim=16
    ),
    "naflex": partial(_naflex, global_pool="avg", fc_norm=False),
    "naflex, registers": partial(
        _naflex, class_token=True, reg_tokens=1, global_pool="token", init_values=0.1
    ),
    "cait": partial(_other, Cait, init_values=0.1, depth_token_only=3, qkv_bias=True),
    "torchvision": torchvision_vit,
    "hugging face, eager": partial(_huggingface, "eager"),
    "hugging face, sdpa": partial(_huggingface, "sdpa"),
    "hugging face, no qkv bias": partial(_huggingface, "sdpa", qkv_bias=False),
}

#: Models whose readout stays no affine map when its norms are frozen: they have no exact ledger.
WITHOUT_LEDGER = {"max pooling", "mlp head"}

#: Models whose readout mixes tokens, so that none has directions of its own.
WITHOUT_DIRECTIONS = {
    *WITHOUT_LEDGER,
    "attention pooling",
    "attention pooling, norm and registers",
}

#: Models whose blocks add attention and MLP at once: there is nothing between them.
PARALLEL = {name for name in FAMILIES if "parallel" in name and "modules" not in name}

#: Models whose tokens before the class-attention blocks are not those of a block of theirs.
CLASS_ATTENTION = {"cait"}

#: Models whose score is not followed back along the rows that are read out: patches are read, or
#: attention adds positions, is a difference, or is no module of its own.
NOT_FOLLOWED = {
    *WITHOUT_DIRECTIONS,
    *PARALLEL,
    *(name for name in FAMILIES if name.startswith(("mean", "differential"))),
    *("parallel modules, mean", "beit", "naflex"),
    *("relative positions", "relative positions, post-norm", "relative positions, shared"),
    *("eva", "eva, rotary and gated MLP", "eva, rotary attention", "eva, shared keys and values"),
    "eva, post-norm",
}

#: Image sizes, channels first, where they are not 3×32×32.
SIZES = {
    "dynamic size": (3, 24, 40),
    "padded": (3, 29, 33),
    "non-square": (3, 24, 40),
    "one channel": (1, 32, 32),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter at random, and statistics of batch norms."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = draw(parameter)
            if parameter.dim() < 2:
                # Biases and the scales of norms and branches: scales stay away from 0.
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(centre + 0.3 * noise)
            else:
                parameter.copy_(0.25 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(draw(buffer).abs() + 0.5)
    return model


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model of the family in eval mode; the weights are the same numbers in every dtype."""
    torch.manual_seed(seed)
    model = FAMILIES[name]().float()
    return randomise(model, seed).to(dtype).eval()


def images(name: str, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Random images that the family takes."""
    generator = torch.Generator().manual_seed(seed)
    size = SIZES.get(name, (3, 32, 32))
    return torch.randn(batch, *size, generator=generator).to(dtype)


def tiny(**options: Any) -> nn.Module:
    """A model by timm's registry, for what does not depend on the family."""
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options})
    return randomise(model).eval()
