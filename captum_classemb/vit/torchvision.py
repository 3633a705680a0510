"""Adapter for torchvision's ``VisionTransformer``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.readout import Activation, ClassEmbedding, Linear, Norm, Part
from captum_classemb.vit.adapt import register_adapter
from captum_classemb.vit.parts import MLP, Attention, Block, Call, ViT, split_heads

__all__ = ["TorchAttention", "adapt_torchvision"]


class TorchAttention(Attention):
    """``nn.MultiheadAttention``, whose projections are no modules of their own.

    Its fused kernel shows neither values nor weights nor what enters W_O, so these are computed
    once more from the tokens that went in.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.num_heads, module.out_proj)
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

    def scale(self) -> float:
        module: Any = self.module
        return float(module.head_dim**-0.5)


def _readout(model: Any) -> ClassEmbedding:
    layers = list(model.heads.children()) if isinstance(model.heads, nn.Sequential) else []
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear):
        raise UnsupportedModelError(
            "torchvision's VisionTransformer is supported with a head of one linear layer, "
            f"this one has {', '.join(type(layer).__name__ for layer in layers) or 'none'}."
        )
    head = layers[0]
    norm = Norm(model.encoder.ln)
    return ClassEmbedding([Part(Linear(head), slice(0, 1))], norm, None, head.out_features)


def _block(layer: Any) -> Block:
    attention = TorchAttention(layer.self_attention)
    attention.entry = (Norm(layer.ln_1),)
    hidden = (Linear(layer.mlp[0]), Activation(layer.mlp[1]))
    mlp = MLP(layer.mlp, layer.mlp[3], entry=(Norm(layer.ln_2),), hidden=hidden)
    return Block(layer, (attention,), (mlp,))


@register_adapter("torchvision.models.vision_transformer.VisionTransformer")
def adapt_torchvision(model: nn.Module) -> ViT:
    """Adapt torchvision's ``VisionTransformer``."""
    vit: Any = model
    blocks = [_block(layer) for layer in vit.encoder.layers]
    size, patch = vit.image_size, vit.patch_size
    return ViT(model, blocks, _readout(vit), 1, (patch, patch), (size, size))
