"""The readout of a model that pools by attention from a latent query (``global_pool="map"``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import wide
from captum_classemb.readout.base import Readout
from captum_classemb.readout.steps import Chain, Linear, Norm, Step, along

__all__ = ["AttentionPooled", "HeldAttentionPooled", "LatentPool", "ProbePool", "TimmLatentPool"]


class LatentPool(ABC):
    """Attention from one learnt query over the tokens, with an MLP after it if there is one.

    The query is the same for all images, so keys and values need not be formed: a head's scores
    are tokens along W_Kᵀq, and its output is W_V applied to one weighted mean of the tokens.

    Attributes:
        heads: H.
        scale: factor of the dot products.
        proj: the steps from the heads' outputs to the pooled token.
        key_norm: the norm of each key, if there is one.
    """

    heads: int
    scale: float
    proj: tuple[Step, ...]
    key_norm: nn.Module | None = None

    @abstractmethod
    def query(self) -> Tensor:
        """H×d."""

    @abstractmethod
    def key_map(self) -> tuple[Tensor, Tensor | None]:
        """W_K (D×D) and its bias."""

    @abstractmethod
    def value_map(self) -> tuple[Tensor, Tensor | None]:
        """W_V (D×D) and its bias."""

    @abstractmethod
    def mlp(self, pooled: Tensor) -> Tensor | None:
        """What the MLP adds to the pooled token, …×D; None without one."""

    def weights(self, tokens: Tensor) -> Tensor:
        """A: B×H×N, for tokens B×N×D in float32 or wider."""
        query = wide(self.query()) * self.scale
        weight, bias = self.key_map()
        if self.key_norm is None:
            # The bias adds the same to every token's score, which the softmax does not see.
            along_query = torch.einsum("hd,hdi->ih", query, self._by_head(weight))
            return (tokens @ along_query).transpose(-2, -1).softmax(-1)
        keys = F.linear(tokens.to(weight.dtype), weight, bias).unflatten(-1, (self.heads, -1))
        return torch.einsum("bnhd,hd->bhn", wide(self.key_norm(keys)), query).softmax(-1)

    def mix(self, tokens: Tensor) -> Tensor:
        """A·V, heads side by side: B×(H·d)."""
        weight, bias = self.value_map()
        means = self.weights(tokens) @ tokens
        mixed = torch.einsum("bhi,hdi->bhd", means, self._by_head(weight)).flatten(1)
        return mixed if bias is None else mixed + wide(bias)

    def values(self, tokens: Tensor) -> Tensor:
        """V, heads side by side: what :meth:`mix` gives for each token alone, …×(H·d)."""
        weight, bias = self.value_map()
        values: Tensor = F.linear(tokens, wide(weight), None if bias is None else wide(bias))
        return values

    def pull_values(self, cotangent: Tensor) -> Tensor:
        """W_Vᵀ·cotangent of each head, B×(H·d) to B×H×D."""
        by_head = cotangent.unflatten(-1, (self.heads, -1))
        return torch.einsum("bhd,hdi->bhi", by_head, self._by_head(self.value_map()[0]))

    def _by_head(self, weight: Tensor) -> Tensor:
        by_head: Tensor = wide(weight.detach()).unflatten(0, (self.heads, -1))
        return by_head


class TimmLatentPool(LatentPool):
    """timm's ``AttentionPoolLatent`` with one latent query.

    Raises:
        UnsupportedModelError: if it has several latents or position embeddings.
    """

    def __init__(self, module: Any) -> None:
        if module.latent_len != 1 or module.pos_embed is not None or module.pool != "token":
            raise UnsupportedModelError(
                "attention pooling with several latents or positions of its own is not supported."
            )
        self.module, self.heads, self.scale = module, module.num_heads, float(module.scale)
        self.proj = () if isinstance(module.proj, nn.Identity) else (Linear(module.proj),)
        self.key_norm = None if isinstance(module.k_norm, nn.Identity) else module.k_norm

    def query(self) -> Tensor:
        pool = self.module
        query: Tensor = pool.q_norm(pool.q(pool.latent).reshape(self.heads, -1))
        return query

    def key_map(self) -> tuple[Tensor, Tensor | None]:
        return self._half(0)

    def value_map(self) -> tuple[Tensor, Tensor | None]:
        return self._half(1)

    def _half(self, index: int) -> tuple[Tensor, Tensor | None]:
        both = Linear(self.module.kv)
        bias = both.offset()
        return both.weight.chunk(2)[index], None if bias is None else bias.chunk(2)[index]

    def mlp(self, pooled: Tensor) -> Tensor | None:
        pool = self.module
        return None if pool.mlp is None else pool.mlp(pool.norm(pooled))


class ProbePool(LatentPool):
    """SigLIP's pooling head: a probe, ``nn.MultiheadAttention``, and an MLP."""

    def __init__(self, module: Any) -> None:
        attention = module.attention
        self.module, self.heads = module, attention.num_heads
        self.scale = float(attention.head_dim**-0.5)
        self.proj = (Linear(attention.out_proj),)

    def _third(self, index: int) -> tuple[Tensor, Tensor]:
        attention = self.module.attention
        weight, bias = attention.in_proj_weight.detach(), attention.in_proj_bias.detach()
        return weight.chunk(3)[index], bias.chunk(3)[index]

    def query(self) -> Tensor:
        return F.linear(self.module.probe, *self._third(0)).reshape(self.heads, -1)

    def key_map(self) -> tuple[Tensor, Tensor | None]:
        return self._third(1)

    def value_map(self) -> tuple[Tensor, Tensor | None]:
        return self._third(2)

    def mlp(self, pooled: Tensor) -> Tensor | None:
        added: Tensor = self.module.mlp(self.module.layernorm(pooled))
        return added


class AttentionPooled(Readout):
    """Attention pooling, a norm if there is one, and a linear classifier.

    Held, the pool's attention and every σ keep their values: the readout is then affine in the
    tokens, and what the pool's MLP adds is an entry of its own.

    Args:
        pool: the pool.
        head: the classifier, or None where the pooled token is the image's embedding.
        reads: the tokens pooled, as a slice of all N.
        num_classes: C, or the width of the embedding.
        token_norm: the norm of each token before the pool.
        pooled_norm: the norm after the pool.
    """

    def __init__(
        self,
        pool: LatentPool,
        head: Linear | None,
        reads: slice,
        num_classes: int,
        token_norm: Norm | None,
        pooled_norm: Norm | None,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.reads = reads
        self.num_classes = num_classes
        self.before: tuple[Norm, ...] = () if token_norm is None else (token_norm,)
        norms = () if pooled_norm is None else (pooled_norm,)
        self.after: tuple[Step, ...] = norms if head is None else (*norms, head)

    def forward(self, rows: Tensor) -> Tensor:
        return self._read(self.pool.mix(Chain.of(self.before, wide(rows)).output))

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        # A token read alone has all of the pool's attention.
        logits = self._read(self.pool.values(Chain.of(self.before, wide(tokens)).output))
        if target is None:
            return logits
        return logits.gather(-1, target[:, None, None].expand(*tokens.shape[:2], 1))[..., 0]

    def _read(self, mixed: Tensor) -> Tensor:
        pooled = Chain.of(self.pool.proj, mixed).output
        added = self.pool_mlp(pooled)
        return Chain.of(self.after, pooled if added is None else pooled + added).output

    def pool_mlp(self, pooled: Tensor) -> Tensor | None:
        """What the pool's MLP adds, computed in the model's own dtype: …×D."""
        added = self.pool.mlp(pooled.to(self.pool.value_map()[0].dtype))
        return None if added is None else wide(added)

    def hold(self, rows: Tensor) -> HeldAttentionPooled:
        return HeldAttentionPooled(self, wide(rows))


class HeldAttentionPooled:
    """The readout with the pool's attention and every σ held at some rows (B×Q×D)."""

    def __init__(self, readout: AttentionPooled, rows: Tensor) -> None:
        self.pool = readout.pool
        self.before = Chain.of(readout.before, rows)
        tokens = self.before.output
        self.weights = self.pool.weights(tokens)
        self.proj = Chain.of(self.pool.proj, self.pool.mix(tokens)[:, None])
        self.mlp_out = readout.pool_mlp(self.proj.output)
        total = self.proj.output if self.mlp_out is None else self.proj.output + self.mlp_out
        self.after = Chain.of(readout.after, total)

    def _at_pool(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangent of what the pool returns (B×1×D), and what biases after it add."""
        return self.after.pull_offsets(g[:, None])

    def _carried(self, g: Tensor) -> tuple[Tensor, Tensor]:
        c, after = self._at_pool(g)
        z, proj = self.proj.pull_offsets(c)
        by_head = self.pool.pull_values(z[:, 0])
        u, before = self.before.pull_offsets(self.weights.transpose(-2, -1) @ by_head)
        # The weights of a head sum to 1, so its bias counts once.
        return u, after + proj + along(self.pool.value_map()[1], z) + before

    def pull(self, logit_weights: Tensor) -> Tensor:
        """The directions u (B×Q×D) for the logit weights g (B×C)."""
        return self._carried(logit_weights)[0]

    def offset(self, logit_weights: Tensor) -> Tensor:
        """What biases add to g·logits: B."""
        return self._carried(logit_weights)[1]

    def pooled_mlp(self, logit_weights: Tensor) -> Tensor | None:
        """What the pool's MLP adds to g·logits: B; None without one."""
        if self.mlp_out is None:
            return None
        return (self._at_pool(logit_weights)[0] * self.mlp_out).sum((1, 2))
