"""The readout of a model that pools by attention from a latent query (``global_pool="map"``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.readout.activation import Activation
from captum_classemb.readout.base import Readout
from captum_classemb.readout.linear import Linear
from captum_classemb.readout.norm import Norm
from captum_classemb.readout.output_path import OutputPath, along
from captum_classemb.readout.steps import Step

__all__ = ["AttentionPooled", "LatentPool", "ProbePool", "TimmLatentPool"]


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

    module: Any
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

    def mlp_steps(self) -> tuple[Step, ...] | None:
        """The steps of the MLP, from its norm to its last linear layer; None if not known."""
        return None

    def weights(self, tokens: Tensor) -> Tensor:
        """A: B×H×N, for tokens B×N×D in float32 or upcastr."""
        query = upcast(self.query()) * self.scale
        weight, bias = self.key_map()
        if self.key_norm is None:
            # The bias adds the same to every token's score, which the softmax does not see.
            along_query = torch.einsum("hd,hdi->ih", query, self._by_head(weight))
            return (tokens @ along_query).transpose(-2, -1).softmax(-1)
        keys = F.linear(tokens.to(weight.dtype), weight, bias).unflatten(-1, (self.heads, -1))
        return torch.einsum("bnhd,hd->bhn", upcast(self.key_norm(keys)), query).softmax(-1)

    def mix(self, tokens: Tensor) -> Tensor:
        """A·V, heads side by side: B×(H·d)."""
        weight, bias = self.value_map()
        means = self.weights(tokens) @ tokens
        mixed = torch.einsum("bhi,hdi->bhd", means, self._by_head(weight)).flatten(1)
        return mixed if bias is None else mixed + upcast(bias)

    def values(self, tokens: Tensor) -> Tensor:
        """V, heads side by side: what :meth:`mix` gives for each token alone, …×(H·d)."""
        weight, bias = self.value_map()
        values: Tensor = F.linear(tokens, upcast(weight), None if bias is None else upcast(bias))
        return values

    def vjp_values(self, cotangent: Tensor) -> Tensor:
        """W_Vᵀ·cotangent of each head, B×1×K×(H·d) to B×K×H×D."""
        by_head = cotangent[:, 0].unflatten(-1, (self.heads, -1))
        return torch.einsum("bkhd,hdi->bkhi", by_head, self._by_head(self.value_map()[0]))

    def _by_head(self, weight: Tensor) -> Tensor:
        by_head: Tensor = upcast(weight.detach()).unflatten(0, (self.heads, -1))
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

    def mlp_steps(self) -> tuple[Step, ...] | None:
        pool, mlp = self.module, self.module.mlp
        kind = type(mlp)
        plain = kind.__module__.startswith("timm.") and kind.__name__ == "Mlp"
        if not plain or not isinstance(mlp.norm, nn.Identity):
            return None
        norm = () if isinstance(pool.norm, nn.Identity) else (Norm(pool.norm),)
        return (*norm, Linear(mlp.fc1), Activation(mlp.act), Linear(mlp.fc2))


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

    def mlp_steps(self) -> tuple[Step, ...] | None:
        mlp: Any = self.module.mlp
        hidden = Linear(mlp.fc1), Activation(mlp.activation_fn), Linear(mlp.fc2)
        return (Norm(self.module.layernorm), *hidden)


class AttentionPooled(Readout):
    """Attention pooling, a norm if there is one, and a linear classifier.

    Frozen, the pool's attention and every σ keep their values: the readout is then affine in the
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
        tokens = OutputPath.of(self.before, upcast(rows)).output
        logits = self._read(self.pool.mix(tokens.flatten(0, -3)))
        return logits.view(*rows.shape[:-2], logits.shape[-1])

    def project(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        # A token read alone has all of the pool's attention.
        logits = self._read(self.pool.values(OutputPath.of(self.before, upcast(tokens)).output))
        if target is None:
            return logits
        return logits.gather(-1, target[:, None, None].expand(*tokens.shape[:2], 1))[..., 0]

    def _read(self, mixed: Tensor) -> Tensor:
        pooled = OutputPath.of(self.pool.proj, mixed).output
        added = self.pool_mlp(pooled)
        return OutputPath.of(self.after, pooled if added is None else pooled + added).output

    def pool_mlp(self, pooled: Tensor) -> Tensor | None:
        """What the pool's MLP adds, computed in the model's own dtype: …×D."""
        added = self.pool.mlp(pooled.to(self.pool.value_map()[0].dtype))
        return None if added is None else upcast(added)

    def vjp(self, rows: Tensor, g: Tensor, frozen: bool = False, summed: bool = False) -> Tensor:
        if not frozen:
            return super().vjp(rows, g, frozen, summed)
        return FrozenPool(self, upcast(rows)).carried_back(g)[0]

    def constants(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        pool = FrozenPool(self, upcast(rows))
        return pool.carried_back(g)[1], pool.mlp_share(g)

    def linearised(self, rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return FrozenPool(self, upcast(rows)).carried_back(g, through_mlp=True)


class FrozenPool:
    """The readout with the pool's attention and every σ frozen at some rows (B×Q×D)."""

    def __init__(self, readout: AttentionPooled, rows: Tensor) -> None:
        self.pool = readout.pool
        self.before = OutputPath.of(readout.before, rows)
        tokens = self.before.output
        self.weights = self.pool.weights(tokens)
        self.proj = OutputPath.of(self.pool.proj, self.pool.mix(tokens)[:, None])
        self.mlp_out = readout.pool_mlp(self.proj.output)
        total = self.proj.output if self.mlp_out is None else self.proj.output + self.mlp_out
        self.after = OutputPath.of(readout.after, total)

    def carried_back(self, g: Tensor, through_mlp: bool = False) -> tuple[Tensor, Tensor]:
        """The directions of the tokens (B×Q×K×D) for the logit weights g (B×K×C), and biases."""
        g = g[:, None]
        c = self.after.vjp(g, frozen=True)
        added: Tensor | float = 0.0
        steps = self.pool.mlp_steps()
        if through_mlp and self.mlp_out is not None:
            if steps is None:
                raise UnsupportedModelError(
                    f"the MLP of the pool {type(self.pool.module).__qualname__} is not known, so "
                    "no derivative runs through it with its activation's gate frozen."
                )
            mlp = OutputPath.of(steps, self.proj.output)
            added = mlp.biases(c)
            c = c + mlp.vjp(c, frozen=True)
        z = self.proj.vjp(c, frozen=True)
        by_head = self.pool.vjp_values(z)
        tokens = torch.einsum("bhq,bkhi->bqki", self.weights, by_head)
        # The weights of a head sum to 1, so its bias counts once.
        bias = self.after.biases(g) + self.proj.biases(c) + along(self.pool.value_map()[1], z)
        return self.before.vjp(tokens, frozen=True), bias + added + self.before.biases(tokens)

    def mlp_share(self, g: Tensor) -> Tensor | None:
        """What the pool's MLP adds to g·logits: B×K; None without one."""
        if self.mlp_out is None:
            return None
        c = self.after.vjp(g[:, None], frozen=True)
        return (c * self.mlp_out[..., None, :]).sum((1, 3))
