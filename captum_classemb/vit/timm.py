"""Adapters for timm's Vision Transformers: where tokens come from and how they are read."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import global_pool_nlc
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout import (
    AttentionPooled,
    ClassEmbedding,
    FunctionReadout,
    Linear,
    Norm,
    Part,
    Readout,
)
from captum_classemb.readout.attention_pooled import TimmLatentPool
from captum_classemb.vit.adapt import register_adapter
from captum_classemb.vit.parts import ViT
from captum_classemb.vit.timm_attention import TimmAttention
from captum_classemb.vit.timm_blocks import read_block

__all__ = ["TimmAttention", "adapt_timm"]


def _norm(model: Any, name: str) -> Norm | None:
    """One of the model's last norms as a step, or None where there is none."""
    module = getattr(model, name, None)
    return None if module is None or isinstance(module, nn.Identity) else Norm(module)


def _readout(model: Any) -> Readout | None:
    if isinstance(model.head, nn.Identity):
        return None
    token_norm, pooled_norm = _norm(model, "norm"), _norm(model, "fc_norm")
    if hasattr(model, "head_dist"):
        parts = [
            Part(Linear(model.head), slice(0, 1), 0.5),
            Part(Linear(model.head_dist), slice(1, 2), 0.5),
        ]
        return ClassEmbedding(parts, token_norm, None, model.num_classes)
    pooling = model.global_pool
    # Eva's attention pool reads prefix tokens too; the others say by this flag whether they do.
    with_prefix = getattr(model, "pool_include_prefix", _pool(model) is not None)
    first = 0 if with_prefix else model.num_prefix_tokens
    patches = slice(first, None)
    if not pooling:
        raise UnsupportedModelError(
            f"{type(model).__qualname__} does not pool its tokens (global_pool=''), "
            "so it has no logits of an image."
        )
    tokens = slice(0, 1) if pooling == "token" else patches
    head, classes = linear_head(model.head), head_size(model.head)
    if head is not None and pooling in ("token", "avg"):
        return ClassEmbedding([Part(head, tokens)], token_norm, pooled_norm, classes)
    if head is not None and type(_pool(model)).__name__ == "AttentionPoolLatent":
        pool = TimmLatentPool(model.attn_pool)
        return AttentionPooled(pool, head, patches, classes, token_norm, pooled_norm)
    return FunctionReadout(partial(_pool_and_head, model), tokens, classes)


def _pool(model: Any) -> nn.Module | None:
    return getattr(model, "attn_pool", None)


def _pool_and_head(model: Any, rows: Tensor) -> Tensor:
    """Any other pooling or head, through the model's own modules, on the rows that are read."""
    tokens, pool = model.norm(rows), _pool(model)
    pooled = global_pool_nlc(tokens, model.global_pool, 0, True) if pool is None else pool(tokens)
    after: Any = getattr(model, "fc_norm", None) or nn.Identity()
    logits: Tensor = model.head(after(pooled))
    return logits


def linear_head(head: nn.Module) -> Linear | None:
    """A head that is one linear layer, dropout aside, as a step; None for any other."""
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    layers = [m for m in layers if not isinstance(m, (nn.Dropout, nn.Identity))]
    if len(layers) == 1 and hasattr(layers[0], "in_features"):
        return Linear(layers[0])
    return None


def head_size(head: nn.Module) -> int:
    """The number of classes: the width of the head's last linear layer.

    Raises:
        UnsupportedModelError: if it has none.
    """
    linears: list[Any] = [m for m in head.modules() if hasattr(m, "out_features")]
    if not linears:
        raise UnsupportedModelError(
            f"the head {type(head).__qualname__} has no linear layer, so the number of "
            "classes is not known."
        )
    return int(linears[-1].out_features)


def _image_size(model: Any) -> tuple[int, int] | None:
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is None or not getattr(embed, "strict_img_size", True):
        return None
    height, width = size
    return int(height), int(width)


def _patch_size(model: Any) -> tuple[int, int]:
    embed = model.embeds if hasattr(model, "embeds") else model.patch_embed
    size: Any = getattr(embed, "patch_size", None)
    if hasattr(embed, "feat_ratio"):
        size = embed.feat_ratio(as_scalar=False)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of an image as the embedding itself tells it (padding, a convolutional stem)."""
    embed, (p, q) = model.patch_embed, _patch_size(model)
    exact = _image_size(model) is None and getattr(embed, "dynamic_img_pad", None) is False
    if exact and (size[0] % p or size[1] % q):
        raise InputError(
            f"images of {size[0]}×{size[1]} pixels are no whole number of {p}×{q} patches, "
            "which the model needs."
        )
    h, w = embed.dynamic_feat_size(size)
    return int(h), int(w)


@register_adapter("timm.models.vision_transformer.VisionTransformer")
@register_adapter("timm.models.deit.VisionTransformerDistilled")
@register_adapter("timm.models.eva.Eva")
@register_adapter("timm.models.beit.Beit")
@register_adapter("timm.models.vision_transformer_relpos.VisionTransformerRelPos")
@register_adapter("timm.models.naflexvit.NaFlexVit")
@register_adapter("timm.models.cait.Cait")
def adapt_timm(model: nn.Module) -> ViT:
    """Adapt a plain Vision Transformer of timm.

    Raises:
        UnsupportedModelError: if its blocks, attention, norms or pooling are not known.
    """
    vit: Any = model
    # CaiT's CLS token passes through its class-attention blocks alone.
    blocks = getattr(vit, "blocks_token_only", None) or vit.blocks
    told = hasattr(getattr(vit, "patch_embed", None), "dynamic_feat_size")
    return ViT(
        model,
        [read_block(block) for block in blocks],
        _readout(vit),
        vit.num_prefix_tokens,
        _patch_size(vit),
        _image_size(vit),
        channels=vit.in_chans,
        grid=partial(_grid, vit) if told else None,
    )
