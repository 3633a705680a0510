"""Adapter for torchvision's ``VisionTransformer``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.readout import Activation, Linear, Norm, Step
from captum_classemb.readout.features import Features, layers_of
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import MLP, Attention, Block, Call, split_heads, uncompiled

__all__ = ["TorchAttention", "adapt_torchvision"]


class TorchAttention(Attention):
    """``nn.MultiheadAttention``, whose projections are no modules of their own.

    Its fused kernel shows neither values nor weights nor what enters W_O, so these are computed
    once more from the tokens that went in.
    """

    def __init__(self, module: Any, outer: tuple[Step, ...] = ()) -> None:
        if not module.batch_first:
            raise UnsupportedModelError(
                "nn.MultiheadAttention that takes tokens before the batch is not supported: build "
                "the model with batch_first=True."
            )
        super().__init__(module, module.num_heads, module.out_proj, outer)
        self.projections = (Linear(module, names=("in_proj_weight", "in_proj_bias")),)

    def _project(self, tokens: Tensor, index: int) -> Tensor:
        module: Any = self.module
        rows = slice(index * module.embed_dim, (index + 1) * module.embed_dim)
        bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
        projected = F.linear(tokens, module.in_proj_weight[rows], bias)
        return split_heads(projected, self.heads)

    def values(self, call: Call) -> Tensor:
        return self._project(call.input, 2)

    def queries(self, call: Call, rows: slice) -> Tensor:
        return self._project(call.input[:, rows], 0)

    def keys(self, call: Call) -> Tensor:
        return self._project(call.input, 1)

    def coefficients(self, call: Call, rows: slice) -> Tensor:
        # The kernel reads W_O's weight without calling the module, so no hook sees what enters it.
        return self.mixed(call, rows)

    def bias(self, call: Call, rows: slice) -> Tensor | None:
        if any(call.kwargs.get(name) is not None for name in ("attn_mask", "key_padding_mask")):
            raise UnsupportedModelError("attention masks that leave tokens out are not supported.")
        return None

    def scale(self) -> float:
        module: Any = self.module
        return float(module.head_dim**-0.5)


def _block(layer: Any) -> Block:
    attention = TorchAttention(layer.self_attention)
    attention.entry = (Norm(layer.ln_1),)
    hidden = (Linear(layer.mlp[0]), Activation(layer.mlp[1]))
    mlp = MLP(layer.mlp, layer.mlp[3], entry=(Norm(layer.ln_2),), hidden=hidden)
    return Block(layer, (attention,), (mlp,))


def adapt_torchvision(model: nn.Module) -> ViT:
    """Adapt torchvision's ``VisionTransformer``."""
    vit: Any = model
    blocks = [_block(uncompiled(layer)) for layer in vit.encoder.layers]
    size, patch = (vit.image_size,) * 2, (vit.patch_size,) * 2
    features = Features((slice(0, 1),), vit.hidden_dim, 1, Norm(vit.encoder.ln))
    readout = features.read_by(vit.heads) if any(layers_of([vit.heads])) else None
    channels = vit.conv_proj.weight.shape[1] if isinstance(vit.conv_proj, nn.Conv2d) else 3
    return ViT(model, blocks, readout, 1, patch, size, channels, features=features)
