"""timm's attention modules, one class each, chosen by the name of the module's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.attention import attention_weights
from captum_classemb.functional.precision import upcast
from captum_classemb.readout import Gate, Linear, Norm, Scale, Step
from captum_classemb.vit.parts import Attention, Call, split_heads

__all__ = ["TimmAttention", "read_attention"]

ALL = slice(None)


def _present(module: Any, name: str) -> Any:
    """An optional submodule: None where it is missing or an identity."""
    child = getattr(module, name, None)
    return None if isinstance(child, nn.Identity) else child


def _additive(mask: Tensor | None, rows: slice) -> Tensor | None:
    """An attention mask (…×N×N or …×1×N) as what is added before the softmax, at some rows."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask if mask.shape[-2] == 1 else mask[..., rows, :]


class TimmAttention(Attention):
    """``timm.layers.Attention``: one projection for queries, keys and values."""

    def __init__(self, module: Any, outer: tuple[Step, ...] = ()) -> None:
        watch = [m for m in (module.qkv, _present(module, "norm")) if m is not None]
        super().__init__(module, module.num_heads, module.proj, outer, watch)
        if module.qkv is not None:
            self.projections = (Linear(module.qkv),)
        gate = _present(module, "gate")
        self.gate = None if gate is None else Linear(gate)
        self.query_steps, self.key_steps = (
            () if norm is None else (Norm(norm, self.heads),)
            for norm in (_present(module, "q_norm"), _present(module, "k_norm"))
        )

    def scale(self) -> float:
        # The fused kernel takes the width of a head, whatever the module's attribute says.
        module: Any = self.module
        head = module.qkv if module.qkv is not None else module.q_proj
        width = head.out_features // (3 if module.qkv is not None else 1) // self.heads
        return float(width**-0.5) if module.fused_attn else float(module.scale)

    def split(self, call: Call, index: int) -> Tensor:
        """Queries (0), keys (1) or values (2) as the projection returns them: B×H×N×d."""
        module: Any = self.module
        return split_heads(call.inner[module.qkv].chunk(3, -1)[index], self.heads)

    def values(self, call: Call) -> Tensor:
        return self.split(call, 2)

    def queries(self, call: Call, rows: slice) -> Tensor:
        module: Any = self.module
        queries: Tensor = module.q_norm(self.split(call, 0)[:, :, rows])
        return queries

    def keys(self, call: Call) -> Tensor:
        module: Any = self.module
        keys: Tensor = module.k_norm(self.split(call, 1))
        return keys

    def bias(self, call: Call, rows: slice) -> Tensor | None:
        if call.kwargs.get("is_causal"):
            raise UnsupportedModelError("causal attention is not supported.")
        return _additive(call.kwargs.get("attn_mask"), rows)

    def mixed(self, call: Call, rows: slice) -> Tensor:
        # A norm is the first to read A·V: what it was called with need not be computed again.
        entered = call.entered.get(_present(self.module, "norm"))
        return super().mixed(call, rows) if entered is None else upcast(entered[:, rows])

    def inner(self, call: Call, rows: slice) -> tuple[Step, ...]:
        steps: list[Step] = []
        norm, gate = _present(self.module, "norm"), _present(self.module, "gate")
        if norm is not None:
            steps.append(Norm(norm))
        if gate is not None:
            steps.append(Gate(gate(call.input[:, rows]).sigmoid()))
        return tuple(steps)


class RotaryAttention(TimmAttention):
    """``AttentionRope`` and ``EvaAttention``: rotary positions, fused or split projections."""

    def __init__(self, module: Any, outer: tuple[Step, ...] = ()) -> None:
        super().__init__(module, outer)
        if module.qkv is None:
            self.watch = (module.q_proj, module.k_proj, module.v_proj, *self.watch)
            self.projections = tuple(map(Linear, self.watch[:3]))
            shared = getattr(module, "num_kv_groups", 1)
            self.key_steps = tuple(
                Norm(norm, self.heads // shared)
                for norm in (_present(module, "k_norm"),)
                if norm is not None
            )
        elif getattr(module, "q_bias", None) is not None:
            self.projections = (BiasedLinear(module),)

    def split(self, call: Call, index: int) -> Tensor:
        module: Any = self.module
        if module.qkv is None:
            projected = call.inner[self.watch[index]]
            shared = getattr(module, "num_kv_groups", 1) if index else 1
            heads = split_heads(projected, self.heads // shared)
            return heads.repeat_interleave(shared, dim=1) if shared > 1 else heads
        if getattr(module, "q_bias", None) is None or module.qkv_bias_separate:
            return super().split(call, index)
        return split_heads(_biased_projection(module, call.input, index), self.heads)

    def _rotate(self, heads: Tensor, call: Call) -> Tensor:
        module: Any = self.module
        rope = call.kwargs.get("rope")
        if rope is None:
            return heads
        prefix = module.num_prefix_tokens
        half = getattr(module, "rotate_half", False)
        turned = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=half)
        return torch.cat([heads[:, :, :prefix], turned], dim=2).type_as(heads)

    def queries(self, call: Call, rows: slice) -> Tensor:
        module: Any = self.module
        if rows.stop is not None and 0 <= rows.stop <= module.num_prefix_tokens:
            return super().queries(call, rows)
        return self._rotate(super().queries(call, ALL), call)[:, :, rows]

    def keys(self, call: Call) -> Tensor:
        return self._rotate(super().keys(call), call)


class BiasedLinear(Linear):
    """A projection whose module leaves its biases to the attention module.

    Args:
        attention: has ``qkv``, ``q_bias``, ``k_bias`` and ``v_bias``.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__(attention.qkv)
        self.attention = attention

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        if self._read is not None:
            return self._read
        module = self.attention
        weight, own = super()._parameters()
        bias = upcast(torch.cat([module.q_bias, module.k_bias, module.v_bias]).detach())
        if module.qkv_bias_separate and own is not None:
            bias = bias + own
        return weight, bias


def _biased_projection(module: Any, tokens: Tensor, index: int) -> Tensor:
    """q, k or v where the module adds biases of its own to the weight of ``qkv``."""
    bias = (module.q_bias, module.k_bias, module.v_bias)[index]
    return F.linear(tokens, module.qkv.weight.chunk(3)[index], bias)


class BeitAttention(TimmAttention):
    """BEiT's attention: biases apart from the projection, relative positions."""

    def __init__(self, module: Any, outer: tuple[Step, ...] = ()) -> None:
        super().__init__(module, outer)
        if module.q_bias is not None:
            self.projections = (BiasedLinear(module),)

    def split(self, call: Call, index: int) -> Tensor:
        module: Any = self.module
        if module.q_bias is None or module.qkv_bias_separate:
            return super().split(call, index)
        return split_heads(_biased_projection(module, call.input, index), self.heads)

    def queries(self, call: Call, rows: slice) -> Tensor:
        return self.split(call, 0)[:, :, rows]

    def keys(self, call: Call) -> Tensor:
        return self.split(call, 1)

    def bias(self, call: Call, rows: slice) -> Tensor | None:
        module: Any = self.module
        total = call.kwargs.get("shared_rel_pos_bias")
        if module.relative_position_bias_table is not None:
            own = module._get_rel_pos_bias()
            total = own if total is None else own + total
        return None if total is None else total[..., rows, :]


class RelPosAttention(TimmAttention):
    """Relative positions, of the module itself or shared by all blocks."""

    def bias(self, call: Call, rows: slice) -> Tensor | None:
        module: Any = self.module
        if module.rel_pos is not None:
            return module.rel_pos.get_bias()[..., rows, :]  # type: ignore[no-any-return]
        shared = call.kwargs.get("shared_rel_pos")
        return None if shared is None else shared[..., rows, :]


class ClassAttention(Attention):
    """CaiT's class attention: CLS alone asks, all tokens answer."""

    def __init__(self, module: Any, outer: tuple[Step, ...] = ()) -> None:
        watch = (module.q, module.k, module.v)
        super().__init__(module, module.num_heads, module.proj, outer, watch)
        self.projections = tuple(map(Linear, watch))

    def scale(self) -> float:
        module: Any = self.module
        fused = (module.q.out_features // self.heads) ** -0.5
        return float(fused) if module.fused_attn else float(module.scale)

    def values(self, call: Call) -> Tensor:
        return split_heads(call.inner[self.watch[2]], self.heads)

    def queries(self, call: Call, rows: slice) -> Tensor:
        query = call.inner[self.watch[0]]
        return split_heads(query.reshape(len(query), 1, -1), self.heads)[:, :, rows]

    def keys(self, call: Call) -> Tensor:
        return split_heads(call.inner[self.watch[1]], self.heads)


class DifferentialAttention(TimmAttention):
    """``DiffAttention``: what multiplies the values is A₁ − λA₂; each head has a norm after it."""

    def __init__(self, module: Any, outer: tuple[Step, ...] = ()) -> None:
        super().__init__(module, outer)
        self.watch = (*self.watch, module.sub_norm)

    def scale(self) -> float:
        module: Any = self.module
        return float(module.head_dim**-0.5) if module.fused_attn else float(module.scale)

    def _signed(self, call: Call, index: int) -> Tensor:
        module: Any = self.module
        tokens = call.inner[module.qkv].chunk(3, -1)[index]
        return split_heads(tokens, 2 * self.heads)

    def queries(self, call: Call, rows: slice) -> Tensor:
        module: Any = self.module
        queries: Tensor = module.q_norm(self._signed(call, 0)[:, :, rows])
        return queries

    def keys(self, call: Call) -> Tensor:
        module: Any = self.module
        keys: Tensor = module.k_norm(self._signed(call, 1))
        return keys

    def weights(self, call: Call, rows: slice) -> Tensor:
        module: Any = self.module
        both = attention_weights(
            self.queries(call, rows), self.keys(call), self.scale(), self.bias_left(call, rows)
        )
        factor: Tensor = module._compute_lambda()
        return both[:, 0::2] - factor.to(both.dtype) * both[:, 1::2]

    def mixed(self, call: Call, rows: slice) -> Tensor:
        module: Any = self.module
        entered = call.entered[module.sub_norm][:, :, rows]
        return upcast(entered).transpose(1, 2).flatten(2)

    def inner(self, call: Call, rows: slice) -> tuple[Step, ...]:
        module: Any = self.module
        own = (Norm(module.sub_norm, self.heads), Scale(1 - module.lambda_init))
        return (*own, *super().inner(call, rows))


class ParallelAttention(TimmAttention):
    """The attention half of ``ParallelScalingBlock``, whose one projection feeds the MLP too."""

    def __init__(self, block: Any, outer: tuple[Step, ...] = ()) -> None:
        proj = block.attn_out_proj if block.out_proj is None else block.out_proj
        Attention.__init__(self, block, block.num_heads, proj, outer, (block.in_proj,))
        if block.out_proj is not None:
            self.proj.columns = slice(0, block.in_split[1])

    def scale(self) -> float:
        block: Any = self.module
        return float(block.head_dim**-0.5) if block.fused_attn else float(block.scale)

    def split(self, call: Call, index: int) -> Tensor:
        block: Any = self.module
        parts = call.inner[block.in_proj].split(block.in_split, -1)
        return split_heads(parts[index + 1], self.heads)

    def inner(self, call: Call, rows: slice) -> tuple[Step, ...]:
        return ()

    def coefficients(self, call: Call, rows: slice) -> Tensor:
        entered = Attention.coefficients(self, call, rows)
        return entered if self.proj.columns is None else entered[..., self.proj.columns]

    def output(self, call: Call, rows: slice) -> Tensor:
        if self.proj.columns is None:
            return call.inner[self.proj.module][:, rows]
        return self.proj(self.coefficients(call, rows))


class DifferentialParallelAttention(DifferentialAttention):
    """The attention half of ``DiffParallelScalingBlock``."""

    def __init__(self, block: Any, outer: tuple[Step, ...] = ()) -> None:
        watch = (block.in_proj, block.sub_norm)
        Attention.__init__(self, block, block.num_heads, block.out_proj, outer, watch)
        self.proj.columns = slice(0, block.in_split[1])

    split = ParallelAttention.split
    coefficients = ParallelAttention.coefficients
    output = ParallelAttention.output

    def _signed(self, call: Call, index: int) -> Tensor:
        block: Any = self.module
        tokens = call.inner[block.in_proj].split(block.in_split, -1)[index + 1]
        return split_heads(tokens, 2 * self.heads)

    def inner(self, call: Call, rows: slice) -> tuple[Step, ...]:
        module: Any = self.module
        return Norm(module.sub_norm, self.heads), Scale(1 - module.lambda_init)


_MODULES: dict[str, Callable[[Any, tuple[Step, ...]], Attention]] = {
    "timm.layers.attention.Attention": TimmAttention,
    "timm.layers.attention.AttentionRope": RotaryAttention,
    "timm.layers.diff_attention.DiffAttention": DifferentialAttention,
    "timm.models.beit.Attention": BeitAttention,
    "timm.models.cait.ClassAttn": ClassAttention,
    "timm.models.eva.EvaAttention": RotaryAttention,
    "timm.models.vision_transformer.Attention": TimmAttention,
    "timm.models.vision_transformer.DiffParallelScalingBlock": DifferentialParallelAttention,
    "timm.models.vision_transformer.ParallelScalingBlock": ParallelAttention,
    "timm.models.vision_transformer_relpos.RelPosAttention": RelPosAttention,
}


def read_attention(module: nn.Module, outer: tuple[Step, ...]) -> Attention:
    """The attention of a module of timm.

    Raises:
        UnsupportedModelError: if the module's class is not known.
    """
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name not in _MODULES:
        raise UnsupportedModelError(
            f"attention of type {name} is not supported: it is none of timm's "
            f"{', '.join(sorted({known.rsplit('.', 1)[1] for known in _MODULES}))}."
        )
    return _MODULES[name](module, outer)
