"""Change what attention computes, between the dot products and the values, in unmodified models.

Fused or not, every library's attention ends in one of a few functions of torch. Within an edit they
are intercepted while an attention module runs, in the thread that made the edit and nowhere else:
nothing is set on the model but hooks, and fused attention stays fused unless its weights themselves
are to be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.attention import attention_weights
from captum_classemb.hooks import after, before, hooks_removed
from captum_classemb.vit.active_edits import marked, unless_paused
from captum_classemb.vit.parts import Attention


class AttentionEdit(TorchFunctionMode):
    """An edit of attention; subclasses override some of the four methods below.

    Args:
        attentions: the modules that are edited.

    Attributes:
        reweighs: True where :meth:`weigh` is overridden, which takes weights that fused attention
            does not show.
        changes_weights: False where nothing but :meth:`entering` is overridden.
        unseen: True where whatever reads the pass finds all that the edit did.
    """

    reweighs = False
    changes_weights = True
    unseen = False

    def __init__(self, attentions: Iterable[Attention]) -> None:
        super().__init__()
        self._attentions = tuple(attentions)
        self._module: nn.Module | None = None
        self._softmaxes = 0

    # -- What a subclass changes

    def positions(self, bias: Tensor, scores: tuple[int, ...]) -> Tensor:
        """What is added to dot products of the shape ``scores`` (B×H×Q×N) instead of ``bias``."""
        return bias

    def visible(self, scores: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Which keys each query may attend to: bool, broadcastable to B×H×Q×N; None for all."""
        return None

    def weigh(self, weights: Tensor) -> Tensor:
        """The weights B×H×Q×N that multiply the values."""
        return weights

    def entering(self, module: nn.Module, coefficients: Tensor) -> Tensor:
        """What enters W_O (B×N×M) of an attention module that does not call it as a module."""
        return coefficients

    # -- How it gets there

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, forward passes of this thread are edited."""
        handles: list[RemovableHandle] = []
        mark = nullcontext() if self.unseen else marked(self.changes_weights)
        with hooks_removed(handles), mark, self:
            for attention in self._attentions:
                handles.append(
                    before(attention.module, unless_paused(self._enter(attention.module)))
                )
                handles.append(after(attention.module, unless_paused(self._leave)))
            yield

    def _enter(self, module: nn.Module) -> Callable[..., None]:
        def enter(args: Any, kwargs: Any) -> None:
            self._module, self._softmaxes = module, 0

        return enter

    def _leave(self, args: Any, kwargs: Any, output: Any) -> None:
        module, self._module = self._module, None
        if not self._softmaxes:
            raise UnsupportedModelError(
                f"attention of type {type(module).__qualname__} ends in no softmax that can be "
                "edited."
            )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Of a function that is called here, the edits around this one see the calls.
        edited = None if self._module is None else _EDITED.get(getattr(func, "__name__", ""))
        if edited is None:
            return func(*args, **kwargs)
        return edited(self, func, *args, **kwargs)

    def _add(self, func: Callable[..., Any], scores: Any, other: Any, **rest: Any) -> Any:
        dots = isinstance(scores, Tensor) and isinstance(other, Tensor) and scores.dim() == 4
        return func(scores, self.positions(other, scores.shape) if dots else other, **rest)

    def _softmax(self, func: Callable[..., Any], scores: Tensor, *args: Any, **rest: Any) -> Tensor:
        self._softmaxes += 1
        visible = self.visible(scores.shape, scores.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        return self.weigh(func(scores, *args, **rest))

    def _fused(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Tensor:
        if is_causal:
            raise UnsupportedModelError("causal attention is not supported.")
        self._softmaxes += 1
        shape = (*query.shape[:-1], key.shape[-2])
        mask = None if attn_mask is None else self.positions(attn_mask, shape)
        visible = self.visible(shape, query.device)
        if visible is not None:
            mask = _hidden(mask, visible)
        if not self.reweighs:
            return func(query, key, value, attn_mask=mask, dropout_p=dropout_p, **rest)
        if rest.get("enable_gqa"):
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        if mask is not None and mask.dtype == torch.bool:
            mask = query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        scale = rest.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        weights = F.dropout(self.weigh(attention_weights(query, key, scale, mask)), dropout_p)
        return weights.to(value.dtype) @ value

    def _linear(
        self, func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        module = self._module
        if isinstance(module, nn.MultiheadAttention) and weight is module.out_proj.weight:
            x = self.entering(module, x.transpose(0, 1)).transpose(0, 1)
        return func(x, weight, bias)

    def _multi_head(
        self, func: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, width: int,
        heads: int, weight: Tensor, bias: Tensor | None, *args: Any, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """``nn.MultiheadAttention`` in steps that edits see; its tokens come first, N×B×D."""
        dropout, out_weight, out_bias = args[3:6]
        given = (rest.get(name) for name in ("attn_mask", "key_padding_mask"))
        if (
            not query is key is value
            or rest.get("need_weights")
            or any(x is not None for x in given)
        ):
            raise UnsupportedModelError(
                "nn.MultiheadAttention can be edited where it is plain self-attention that is not "
                "asked for its weights."
            )
        count, batch, _ = query.shape
        projected = F.linear(query, weight, bias).view(count, batch, 3, heads, width // heads)
        q, k, v = projected.permute(2, 1, 3, 0, 4)
        attend, project = F.scaled_dot_product_attention, F.linear
        rate = dropout if rest.get("training") else 0.0
        mixed = self.__torch_function__(attend, (), (q, k, v), {"dropout_p": rate})
        mixed = mixed.permute(2, 0, 1, 3).reshape(count, batch, width)
        return self.__torch_function__(project, (), (mixed, out_weight, out_bias)), None


def _hidden(mask: Tensor | None, visible: Tensor) -> Tensor:
    """An attention mask that also hides what is not visible."""
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, -torch.inf)


_EDITED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "add_", "__add__", "__iadd__"), AttentionEdit._add),
    "linear": AttentionEdit._linear,
    "softmax": AttentionEdit._softmax,
    "scaled_dot_product_attention": AttentionEdit._fused,
    "multi_head_attention_forward": AttentionEdit._multi_head,
}
