"""Models around ``nn.TransformerEncoder``: what a model of one's own is often built of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.readout import Activation, Linear, Norm
from captum_classemb.vit.model import ViT, whole_patches
from captum_classemb.vit.parts import MLP, Block, uncompiled
from captum_classemb.vit.torchvision import TorchAttention

__all__ = ["encoders_of"]


def _block(layer: Any) -> Block:
    if type(layer) is not nn.TransformerEncoderLayer:
        raise UnsupportedModelError(
            f"layers of type {type(layer).__qualname__} are not supported in an "
            "nn.TransformerEncoder: torch's own TransformerEncoderLayer is."
        )
    if not layer.norm_first:
        raise UnsupportedModelError(
            "an nn.TransformerEncoderLayer with norm_first=False normalises the residual stream "
            "itself, which is then no sum of what the branches write: build it with "
            "norm_first=True."
        )
    attention = TorchAttention(layer.self_attn)
    attention.entry = (Norm(layer.norm1),)
    hidden = (Linear(layer.linear1), Activation(layer.activation))
    mlp = MLP(layer.linear2, layer.linear2, entry=(Norm(layer.norm2),), hidden=hidden)
    return Block(layer, (attention,), (mlp,))


def encoders_of(model: nn.Module, encoder: Any) -> Iterator[ViT]:
    """The encoder of a model, read for each size of patches that the model may have.

    The model's own classifier, prefix tokens and image size are not known here.

    Raises:
        UnsupportedModelError: if its layers are not supported.
    """
    blocks = [_block(uncompiled(layer)) for layer in encoder.layers]
    width = encoder.layers[0].linear2.out_features
    inside = set(encoder.modules())
    outside = [module for module in model.modules() if module not in inside]
    for patch, channels in _patches(outside, width):
        vit = ViT(encoder, blocks, None, 0, patch, None, channels, partial(whole_patches, patch))
        yield vit


def _patches(modules: list[nn.Module], width: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Sizes of patches and channels of what may embed them."""
    for module in modules:
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size:
            height, width_ = module.kernel_size
            yield (height, width_), module.in_channels
    for module in modules:
        if isinstance(module, nn.Linear) and module.out_features == width:
            for channels in (3, 1, 4):
                side = math.isqrt(module.in_features // channels)
                if side > 1 and side * side * channels == module.in_features:
                    yield (side, side), channels
