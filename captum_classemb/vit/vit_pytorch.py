"""Adapters for vit_pytorch's ``ViT`` and ``SimpleViT``, whose blocks are no modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.readout import Activation, Linear, Norm
from captum_classemb.readout.features import Features, layers_of
from captum_classemb.vit.model import ViT, whole_patches
from captum_classemb.vit.parts import MLP, Attention, Block, Call, split_heads

__all__ = ["adapt_vit_pytorch"]


class Between(nn.Module):
    """A block as the span from what enters its attention to what enters the module after it.

    Args:
        attention: called with the residual stream.
        feed_forward: likewise, after attention was added.
        following: what is called with the residual stream after the block.
    """

    def __init__(self, attention: nn.Module, feed_forward: nn.Module, following: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self._following = (following,)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x) + x
        y: Tensor = self.feed_forward(x) + x
        return y

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], **options: bool
    ) -> RemovableHandle:
        return self.attention.register_forward_pre_hook(hook, **options)

    def register_forward_hook(
        self, hook: Callable[..., Any], *, with_kwargs: bool = False, **options: bool
    ) -> RemovableHandle:
        def entering(module: nn.Module, args: tuple[Any, ...]) -> Any:
            called: tuple[Any, ...] = ((), {}) if with_kwargs else ((),)
            changed = hook(self, *called, args[0])
            return None if changed is None else (changed, *args[1:])

        return self._following[0].register_forward_pre_hook(entering, **options)


class JointAttention(Attention):
    """Attention with its norm inside, and one projection for queries, keys and values."""

    def __init__(self, module: Any) -> None:
        proj = next(layers_of([module.to_out]), None)
        if not isinstance(proj, nn.Linear):
            raise UnsupportedModelError(
                "vit_pytorch's attention of one head as wide as the model has no output "
                "projection: take several heads."
            )
        super().__init__(module, module.heads, proj, watch=(module.to_qkv,))
        self.entry = (Norm(module.norm),)
        self.projections = (Linear(module.to_qkv),)

    def _part(self, call: Call, index: int) -> Tensor:
        joint: Any = self.module.to_qkv
        return split_heads(call.inner[joint].chunk(3, -1)[index], self.heads)

    def values(self, call: Call) -> Tensor:
        return self._part(call, 2)

    def queries(self, call: Call, rows: slice) -> Tensor:
        return self._part(call, 0)[:, :, rows]

    def keys(self, call: Call) -> Tensor:
        return self._part(call, 1)


def _block(attention: Any, feed_forward: Any, following: nn.Module) -> Block:
    norm, first, activation, last = layers_of([feed_forward.net])
    hidden = (Linear(first), Activation(activation))
    mlp = MLP(feed_forward, last, entry=(Norm(norm),), hidden=hidden)
    module = Between(attention, feed_forward, following)
    return Block(module, (JointAttention(attention),), (mlp,))


def adapt_vit_pytorch(model: nn.Module) -> ViT:
    """Adapt a ``ViT`` or ``SimpleViT``."""
    vit: Any = model
    attentions, feed_forwards = zip(*vit.transformer.layers, strict=True)
    following = (*attentions[1:], vit.transformer.norm)
    blocks = [_block(*parts) for parts in zip(attentions, feed_forwards, following, strict=True)]
    embedding = next(m for m in vit.to_patch_embedding if isinstance(m, nn.Linear))
    p, q = vit.patch_size
    prefix = 1 if vit.pool == "cls" else 0
    tokens = slice(0, 1) if prefix else slice(0, None)
    features = Features((tokens,), embedding.out_features, prefix, Norm(vit.transformer.norm))
    head = vit.linear_head if hasattr(vit, "linear_head") else vit.mlp_head
    readout = None if head is None else features.read_by(vit.to_latent, head)
    channels = embedding.in_features // (p * q)
    grid = partial(whole_patches, (p, q))
    return ViT(model, blocks, readout, prefix, (p, q), None, channels, grid, features)
