"""Adapters for Hugging Face's Vision Transformers, eager or SDPA attention alike."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.readout import (
    Activation,
    AttentionPooled,
    ClassEmbedding,
    LayerScale,
    Linear,
    Norm,
    Part,
    Readout,
    Step,
)
from captum_classemb.readout.activation import GatedActivation
from captum_classemb.readout.attention_pooled import ProbePool
from captum_classemb.readout.linear import SideBySide
from captum_classemb.vit.adapt import register_adapter
from captum_classemb.vit.parts import MLP, Attention, Block, Call, ViT, split_heads, uncompiled

__all__ = ["HuggingFaceAttention", "adapt_classifier", "adapt_image_encoder"]

_CLS = slice(0, 1)


def find(module: nn.Module, *names: str) -> Any:
    """The first submodule or parameter that exists: names differ between families and releases.

    Raises:
        UnsupportedModelError: if none does.
    """
    for name in names:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise UnsupportedModelError(
        f"{type(module).__qualname__} has none of {', '.join(names)}: "
        "this release of transformers is not supported."
    )


class HuggingFaceAttention(Attention):
    """Self-attention with separate query, key and value projections."""

    def __init__(self, module: nn.Module, outer: tuple[Step, ...] = ()) -> None:
        self.q = find(module, "q_proj", "attention.query")
        self.k = find(module, "k_proj", "attention.key")
        self.v = find(module, "v_proj", "attention.value")
        heads = find(module, "num_attention_heads", "num_heads", "attention.num_attention_heads")
        proj = find(module, "o_proj", "out_proj", "output.dense")
        super().__init__(module, heads, proj, outer, watch=(self.q, self.k, self.v))
        self._scale: float = (self.q.out_features // heads) ** -0.5
        self.projections = (Linear(self.q), Linear(self.k), Linear(self.v))

    def values(self, call: Call) -> Tensor:
        return split_heads(call.inner[self.v], self.heads)

    def queries(self, call: Call, rows: slice) -> Tensor:
        return split_heads(call.inner[self.q], self.heads)[:, :, rows]

    def keys(self, call: Call) -> Tensor:
        return split_heads(call.inner[self.k], self.heads)

    def scale(self) -> float:
        return self._scale

    shows_weights = True

    def weights(self, call: Call, rows: slice) -> Tensor:
        # Eager attention shows its weights, which it rounds to float32 in any dtype.
        shown = call.output[1] if isinstance(call.output, tuple) and len(call.output) > 1 else None
        if isinstance(shown, Tensor):
            return upcast(shown[:, :, rows])
        return super().weights(call, rows)

    def plain_softmax(self, call: Call, rows: slice) -> bool:
        shown = call.output[1] if isinstance(call.output, tuple) and len(call.output) > 1 else None
        return shown is None and self.bias(call, rows) is None

    def bias(self, call: Call, rows: slice) -> Tensor | None:
        mask = call.kwargs.get("attention_mask")
        if mask is None:
            return None
        if mask.dtype.is_floating_point:
            return mask[..., rows, :] if mask.shape[-2] > 1 else mask  # type: ignore[no-any-return]
        raise UnsupportedModelError("attention masks that leave tokens out are not supported.")


def _scale(layer: Any, number: str) -> tuple[Step, ...]:
    scale = getattr(layer, f"lambda_{number}", None)
    if scale is None:
        scale = getattr(getattr(layer, f"layer_scale{number}", None), "lambda1", None)
    return (LayerScale(scale),) if isinstance(scale, Tensor) else ()


def _block(layer: Any) -> Block:
    attention = find(layer, "attention", "self_attn")
    if hasattr(getattr(attention, "attention", None), "relative_position_bias"):
        raise UnsupportedModelError(
            "BEiT of this release of transformers adds its relative positions inside attention, "
            "where they cannot be read: release 5 or newer is supported."
        )
    fc2 = find(layer, "mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense")
    mlp = getattr(layer, "mlp", fc2)
    first = find(layer, "layernorm_before", "norm1", "layer_norm1")
    second = find(layer, "layernorm_after", "norm2", "layer_norm2")
    read = HuggingFaceAttention(attention, _scale(layer, "1"))
    read.entry = (Norm(first),)
    entry, hidden = (Norm(second),), _hidden(layer)
    return Block(layer, (read,), (MLP(mlp, fc2, _scale(layer, "2"), entry=entry, hidden=hidden),))


def _hidden(layer: Any) -> tuple[Step, ...] | None:
    """The steps to what enters ``fc2``; None for an MLP that is not known."""
    mlp: Any = getattr(layer, "mlp", None)
    if hasattr(mlp, "gate_proj") and hasattr(mlp, "act_fn"):
        return SideBySide((mlp.gate_proj, mlp.up_proj)), GatedActivation(mlp.act_fn)
    if hasattr(mlp, "weights_in"):
        return Linear(mlp.weights_in), GatedActivation(nn.SiLU())
    if hasattr(layer, "intermediate"):
        act = layer.intermediate.intermediate_act_fn
        return Linear(layer.intermediate.dense), Activation(act)
    act = getattr(mlp, "activation_fn", None) or getattr(mlp, "act_fn", None)
    return None if act is None else (Linear(mlp.fc1), Activation(act))


def _vit(model: Any, encoder: Any, readout: Readout | None, prefix: int, any_size: bool) -> ViT:
    config = encoder.config
    layers = find(encoder, "layers", "encoder.layers", "encoder.layer")
    size, patch = config.image_size, config.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    size = (size, size) if isinstance(size, int) else tuple(size)
    return ViT(
        model,
        [_block(uncompiled(layer)) for layer in layers],
        readout,
        prefix,
        patch,
        None if any_size else size,
        config.num_channels,
        grid=partial(_whole_patches, patch),
    )


def _whole_patches(patch: tuple[int, int], image: tuple[int, int]) -> tuple[int, int]:
    return image[0] // patch[0], image[1] // patch[1]


def _linear(head: nn.Module) -> Linear | None:
    return None if isinstance(head, nn.Identity) else Linear(head)


def _parts(model: Any, name: str, width: int) -> list[Part]:
    """Which tokens each head of a classifier reads."""
    if name == "DeiTForImageClassificationWithTeacher":
        heads = (_linear(model.cls_classifier), _linear(model.distillation_classifier))
        return [
            Part(head, slice(i, i + 1), 0.5) for i, head in enumerate(heads) if head is not None
        ]
    head = _linear(model.classifier)
    if head is None:
        return []
    if name == "Dinov2ForImageClassification":
        # One classifier over CLS beside the mean patch: each reads its own half of the columns.
        halves = (slice(0, width), slice(width, 2 * width))
        tokens = (_CLS, slice(1, None))
        return [
            Part(Linear(model.classifier, columns), where)
            for columns, where in zip(halves, tokens, strict=True)
        ]
    if name == "SiglipForImageClassification":
        return [Part(head, slice(0, None))]
    if name == "BeitForImageClassification" and model.config.use_mean_pooling:
        return [Part(head, slice(1, None))]
    return [Part(head, _CLS)]


_CLASSIFIERS = {
    "ViTForImageClassification": ("vit", 1),
    "ViTMSNForImageClassification": ("vit", 1),
    "DeiTForImageClassification": ("deit", 2),
    "DeiTForImageClassificationWithTeacher": ("deit", 2),
    "BeitForImageClassification": ("beit", 1),
    "Dinov2ForImageClassification": ("dinov2", 1),
    "SiglipForImageClassification": ("vision_model", 0),
}


@register_adapter("transformers.models.vit.modeling_vit.ViTForImageClassification")
@register_adapter("transformers.models.vit_msn.modeling_vit_msn.ViTMSNForImageClassification")
@register_adapter("transformers.models.deit.modeling_deit.DeiTForImageClassification")
@register_adapter("transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher")
@register_adapter("transformers.models.beit.modeling_beit.BeitForImageClassification")
@register_adapter("transformers.models.dinov2.modeling_dinov2.Dinov2ForImageClassification")
@register_adapter("transformers.models.siglip.modeling_siglip.SiglipForImageClassification")
def adapt_classifier(model: nn.Module) -> ViT:
    """Adapt an image classifier of Hugging Face."""
    hf: Any = model
    name = next(c.__name__ for c in type(model).__mro__ if c.__name__ in _CLASSIFIERS)
    attribute, prefix = _CLASSIFIERS[name]
    encoder = find(model, attribute)
    norm: Any = find(encoder, "layernorm", "post_layernorm")
    token_norm = None if isinstance(norm, nn.Identity) else Norm(norm)
    pooler_norm = getattr(getattr(encoder, "pooler", None), "layernorm", None)
    pooled_norm = None if pooler_norm is None else Norm(pooler_norm)
    parts = _parts(model, name, encoder.config.hidden_size)
    readout = None
    if parts:
        readout = ClassEmbedding(parts, token_norm, pooled_norm, hf.config.num_labels)
    return _vit(model, encoder, readout, prefix, any_size=name.startswith("Dinov2"))


@register_adapter("transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection")
@register_adapter("transformers.models.clip.modeling_clip.CLIPModel")
@register_adapter("transformers.models.siglip.modeling_siglip.SiglipVisionModel")
@register_adapter("transformers.models.siglip.modeling_siglip.SiglipModel")
def adapt_image_encoder(model: nn.Module) -> ViT:
    """Adapt the image side of CLIP or SigLIP; its readout gives the image embedding."""
    hf: Any = model
    encoder = getattr(hf, "vision_model", hf)
    norm = Norm(encoder.post_layernorm)
    projection = getattr(hf, "visual_projection", None)
    readout: Readout
    if projection is not None:
        part = Part(Linear(projection), _CLS)
        readout = ClassEmbedding([part], norm, None, projection.out_features)
    else:
        pool, width = ProbePool(encoder.head), encoder.config.hidden_size
        readout = AttentionPooled(pool, None, slice(0, None), width, norm, None)
    vit = _vit(model, encoder, readout, 0 if projection is None else 1, any_size=False)
    if hasattr(hf, "get_image_features"):
        vit.call = hf.get_image_features
    return vit
