"""Adapter for the plain image towers of open_clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.readout import Activation, ClassEmbedding, LayerScale, Linear, Norm, Part, Step
from captum_classemb.readout.features import Features
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Block, uncompiled
from captum_classemb.vit.torchvision import TorchAttention

__all__ = ["adapt_tower"]


class Projection(Linear):
    """A projection that is a bare parameter D×F of the tower."""

    def _parameters(self) -> tuple[Tensor, None]:
        if self._read is None:
            self._read = upcast(self.module.proj.detach()).T, None  # type: ignore[operator]
        return self._read[0], None


def _scale(module: Any) -> tuple[Step, ...]:
    return () if isinstance(module, nn.Identity) else (LayerScale(module.gamma),)


def _block(layer: Any) -> Block:
    if type(layer).__name__ != "ResidualAttentionBlock":
        raise UnsupportedModelError(
            f"blocks of type {type(layer).__qualname__} are not supported: open_clip's "
            "ResidualAttentionBlock is."
        )
    attention = TorchAttention(layer.attn, _scale(layer.ls_1))
    attention.entry = (Norm(layer.ln_1),)
    hidden = (Linear(layer.mlp.c_fc), Activation(layer.mlp.gelu))
    mlp = MLP(
        layer.mlp, layer.mlp.c_proj, _scale(layer.ls_2), entry=(Norm(layer.ln_2),), hidden=hidden
    )
    return Block(layer, (attention,), (mlp,))


def adapt_tower(model: nn.Module) -> ViT:
    """Adapt an image tower of open_clip; its readout gives the image embedding.

    Raises:
        UnsupportedModelError: if it pools by attention (CoCa), or its blocks are not known.
    """
    tower: Any = model
    if tower.attn_pool is not None or tower.pool_type not in ("tok", "avg"):
        raise UnsupportedModelError(
            "CoCa's image tower pools its tokens by attention from many queries, which is not "
            "supported: towers that read the class token or the mean of the patches are."
        )
    tokens = slice(0, 1) if tower.pool_type == "tok" else slice(1, None)
    norm = Norm(tower.ln_post)
    token_norm, pooled_norm = (None, norm) if tower.final_ln_after_pool else (norm, None)
    width = tower.ln_post.normalized_shape[0]
    features = Features((tokens,), width, 1, token_norm, pooled_norm)
    if tower.proj is None:
        readout: Any = features.read_by()
    else:
        part = Part(Projection(tower), tokens)
        readout = ClassEmbedding([part], token_norm, pooled_norm, tower.proj.shape[1])
    blocks = [_block(uncompiled(layer)) for layer in tower.transformer.resblocks]
    height, width = tower.image_size
    channels = tower.conv1.in_channels
    return ViT(
        model,
        blocks,
        readout,
        1,
        tower.patch_size,
        (height, width),
        channels,
        features=features,
    )
