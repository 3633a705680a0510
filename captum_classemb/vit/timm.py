"""Adapters for timm's Vision Transformers: where tokens come from and how they are read."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import global_pool_nlc
from torch import Tensor, nn

from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.readout import ClassEmbedding, FunctionReadout, Norm, Part, Readout
from captum_classemb.readout.attention_pooled import TimmLatentPool
from captum_classemb.readout.features import Features, head_size, linear_head
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import uncompiled
from captum_classemb.vit.timm_attention import TimmAttention
from captum_classemb.vit.timm_blocks import read_block

__all__ = ["TimmAttention", "adapt_timm"]


def _norm(model: Any, name: str) -> Norm | None:
    """One of the model's last norms as a step, or None where there is none."""
    module = getattr(model, name, None)
    return None if module is None or isinstance(module, nn.Identity) else Norm(module)


def _features(model: Any) -> Features | None:
    """What a head reads, where the pooling is one of those that are known."""
    pooling, prefix = model.global_pool, model.num_prefix_tokens
    cls = pooling in ("", None, "token") or hasattr(model, "head_dist")
    # Eva's attention pool reads prefix tokens too; the others say by this flag whether they do.
    with_prefix = getattr(model, "pool_include_prefix", _pool(model) is not None)
    tokens = slice(0, 1) if cls and prefix else slice(0 if with_prefix else prefix, None)
    latent = type(_pool(model)).__name__ == "AttentionPoolLatent"
    if not (cls or pooling == "avg" or latent):
        return None
    pool = TimmLatentPool(model.attn_pool) if latent and not cls else None
    norms = _norm(model, "norm"), _norm(model, "fc_norm")
    return Features((tokens,), model.embed_dim, prefix, *norms, pool)


def _readout(model: Any, features: Features | None) -> Readout | None:
    if isinstance(model.head, nn.Identity):
        return None
    if hasattr(model, "head_dist"):
        parts = [
            Part(linear_head(head), slice(i, i + 1), 0.5)
            for i, head in enumerate((model.head, model.head_dist))
        ]
        return ClassEmbedding(parts, _norm(model, "norm"), None, model.num_classes)
    if not model.global_pool:
        raise UnsupportedModelError(
            f"{type(model).__qualname__} does not pool its tokens (global_pool=''), "
            "so it has no logits of an image."
        )
    if features is not None:
        return features.read_by(model.head)
    first = 0 if getattr(model, "pool_include_prefix", True) else model.num_prefix_tokens
    return FunctionReadout(
        partial(_pool_and_head, model), slice(first, None), head_size([model.head], 0)
    )


def _pool(model: Any) -> nn.Module | None:
    return getattr(model, "attn_pool", None)


def _pool_and_head(model: Any, rows: Tensor) -> Tensor:
    """Any other pooling, through the model's own modules, on the rows that are read."""
    tokens, pool = model.norm(rows), _pool(model)
    pooled = global_pool_nlc(tokens, model.global_pool, 0, True) if pool is None else pool(tokens)
    after: Any = getattr(model, "fc_norm", None) or nn.Identity()
    logits: Tensor = model.head(after(pooled))
    return logits


def _image_size(model: Any) -> tuple[int, int] | None:
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is None or not getattr(embed, "strict_img_size", True):
        return None
    height, width = size
    return int(height), int(width)


def _channels(model: Any) -> int:
    """The channels of the stem's first convolution, which may have been replaced."""
    embed = getattr(model, "patch_embed", nn.Identity())
    convolutions = (m.in_channels for m in embed.modules() if isinstance(m, nn.Conv2d))
    return next(convolutions, int(model.in_chans))


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


def adapt_timm(model: nn.Module) -> ViT:
    """Adapt a plain Vision Transformer of timm.

    Raises:
        UnsupportedModelError: if its blocks, attention, norms or pooling are not known.
    """
    vit: Any = model
    # CaiT's CLS token passes through its class-attention blocks alone.
    blocks = getattr(vit, "blocks_token_only", None) or vit.blocks
    told = hasattr(getattr(vit, "patch_embed", None), "dynamic_feat_size")
    features = _features(vit)
    return ViT(
        model,
        [read_block(uncompiled(block)) for block in blocks],
        _readout(vit, features),
        vit.num_prefix_tokens,
        _patch_size(vit),
        _image_size(vit),
        channels=_channels(vit),
        grid=partial(_grid, vit) if told else None,
        features=features,
    )
