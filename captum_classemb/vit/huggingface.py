"""Adapters for Hugging Face's Vision Transformers, eager or SDPA attention alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.functional.precision import upcast
from captum_classemb.readout import (
    Activation,
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
from captum_classemb.readout.features import Features, layers_of, linear_head
from captum_classemb.readout.linear import SideBySide
from captum_classemb.vit.model import ViT, whole_patches
from captum_classemb.vit.parts import MLP, Attention, Block, Call, split_heads, uncompiled

__all__ = ["HuggingFaceAttention", "adapt_classifier", "adapt_encoder", "adapt_image_encoder"]

_CLS, _ALL = slice(0, 1), slice(0, None)


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
        #: BEiT's relative positions, where attention makes them itself.
        self.table: Any = getattr(
            getattr(module, "attention", None), "relative_position_bias", None
        )
        watch = (self.q, self.k, self.v, *(() if self.table is None else (self.table,)))
        super().__init__(module, heads, proj, outer, watch)
        self._scale: float = (self.q.out_features // heads) ** -0.5
        self.projections = (Linear(self.q), Linear(self.k), Linear(self.v))

    def values(self, call: Call) -> Tensor:
        return split_heads(call.inner[self.v], self.heads)

    def queries(self, call: Call, rows: slice) -> Tensor:
        return _rotated(split_heads(call.inner[self.q], self.heads), call)[:, :, rows]

    def keys(self, call: Call) -> Tensor:
        return _rotated(split_heads(call.inner[self.k], self.heads), call)

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
        if self.table is not None:
            if self.table not in call.inner:
                return self.table.relative_position_bias_table  # type: ignore[no-any-return]
            mask = call.inner[self.table]
        # The fused kernel of Data2Vec adds the shared table to its own in place.
        if self.table is None or "Sdpa" not in type(find(self.module, "attention")).__name__:
            shared = call.kwargs.get("relative_position_bias")
            mask = shared if mask is None else mask if shared is None else mask + shared
        if mask is None:
            return None
        if mask.dtype.is_floating_point:
            return mask[..., rows, :] if mask.shape[-2] > 1 else mask  # type: ignore[no-any-return]
        raise UnsupportedModelError("attention masks that leave tokens out are not supported.")


def _rotated(heads: Tensor, call: Call) -> Tensor:
    """DINOv3's rotary positions, of patch tokens alone."""
    positions = call.kwargs.get("position_embeddings")
    if positions is None:
        return heads
    cos, sin = positions
    prefix = heads[:, :, : heads.shape[2] - cos.shape[-2]]
    patches = heads[:, :, prefix.shape[2] :]
    first, second = patches.chunk(2, -1)
    turned = patches * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([prefix, turned], 2).type_as(heads)


def _scale(layer: Any, number: str) -> tuple[Step, ...]:
    scale = getattr(layer, f"lambda_{number}", None)
    if scale is None:
        scale = getattr(getattr(layer, f"layer_scale{number}", None), "lambda1", None)
    return (LayerScale(scale),) if isinstance(scale, Tensor) else ()


def _block(layer: Any) -> Block:
    attention = find(layer, "attention", "self_attn")
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
    return None if act is None else (Linear(find(mlp, "fc1", "up_proj")), Activation(act))


def _vit(model: nn.Module, encoder: Any, features: Features, readout: Readout | None) -> ViT:
    config = encoder.config
    layers = find(encoder, "layers", "encoder.layers", "encoder.layer", "model.layer")
    patch = _pair(config.patch_size)
    # These interpolate their positions, or turn queries and keys by them, for any size.
    any_size = type(encoder).__name__.startswith(("Dinov2", "DINOv3", "Siglip2"))
    return ViT(
        model,
        [_block(uncompiled(layer)) for layer in layers],
        readout,
        features.prefix,
        patch,
        None if any_size else _pair(config.image_size),
        _channels(encoder),
        partial(whole_patches, patch),
        features,
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _channels(encoder: Any) -> int:
    """The channels of the stem's convolution, which may have been replaced."""
    convolutions = (m.in_channels for m in encoder.modules() if isinstance(m, nn.Conv2d))
    return next(convolutions, int(encoder.config.num_channels))


_PREFIX = {"DeiTModel": 2, "IJepaModel": 0, "SiglipVisionModel": 0, "Siglip2VisionModel": 0}
"""P without register tokens, where it is not 1."""


def _name(model: nn.Module, known: Iterable[str]) -> str:
    return next(c.__name__ for c in type(model).__mro__ if c.__name__ in known)


def _features(encoder: Any, pooling: str) -> Features:
    """What a head reads: ``"cls"``, ``"patches"``, ``"all"`` or ``"both"``, CLS and patches."""
    config = encoder.config
    prefix = getattr(config, "num_register_tokens", 0)
    prefix += _PREFIX.get(_name(encoder, _ENCODERS), 1)
    patches = slice(prefix, None)
    tokens = {"cls": (_CLS,), "patches": (patches,), "all": (_ALL,), "both": (_CLS, patches)}
    last = find(encoder, "layernorm", "post_layernorm", "norm")
    after = getattr(getattr(encoder, "pooler", None), "layernorm", None)
    token_norm, pooled_norm = (
        None if norm is None or isinstance(norm, nn.Identity) else Norm(norm)
        for norm in (last, after)
    )
    return Features(tokens[pooling], config.hidden_size, prefix, token_norm, pooled_norm)


def _pooling(model: Any, encoder: Any) -> str:
    """Which tokens the classifier of a family reads."""
    name = type(encoder).__name__
    if name.startswith("Dinov2") and model is not encoder:
        return "both"
    if name in ("IJepaModel", "SiglipVisionModel", "Siglip2VisionModel"):
        return "all"
    mean = name == "CLIPVisionModel" and model is not encoder
    return "patches" if mean or getattr(encoder.config, "use_mean_pooling", False) else "cls"


_CLASSIFIERS = {
    "ViTForImageClassification": "vit",
    "ViTMSNForImageClassification": "vit",
    "DeiTForImageClassification": "deit",
    "DeiTForImageClassificationWithTeacher": "deit",
    "BeitForImageClassification": "beit",
    "Data2VecVisionForImageClassification": "data2vec_vision",
    "Dinov2ForImageClassification": "dinov2",
    "Dinov2WithRegistersForImageClassification": "dinov2_with_registers",
    "IJepaForImageClassification": "ijepa",
    "CLIPForImageClassification": "vision_model",
    "SiglipForImageClassification": "vision_model",
    "Siglip2ForImageClassification": "vision_model",
}
_ENCODERS = (
    "ViTModel",
    "ViTMSNModel",
    "DeiTModel",
    "BeitModel",
    "Data2VecVisionModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "DINOv3ViTModel",
    "IJepaModel",
    "CLIPVisionModel",
    "SiglipVisionModel",
    "Siglip2VisionModel",
)


def adapt_classifier(model: nn.Module) -> ViT:
    """Adapt an image classifier of Hugging Face."""
    hf: Any = model
    name = _name(model, _CLASSIFIERS)
    encoder = find(model, _CLASSIFIERS[name])
    encoder = getattr(encoder, "vision_model", encoder)
    features = _features(encoder, _pooling(model, encoder))
    if name == "CLIPForImageClassification":
        features = replace(features, token_norm=None)
    readout: Readout | None = None
    if name == "DeiTForImageClassificationWithTeacher":
        heads = (hf.cls_classifier, hf.distillation_classifier)
        parts = [
            Part(linear_head(head), slice(i, i + 1), 0.5)
            for i, head in enumerate(heads)
            if not isinstance(head, nn.Identity)
        ]
        if parts:
            readout = ClassEmbedding(parts, features.token_norm, None, hf.config.num_labels)
    elif any(layers_of([hf.classifier])):
        readout = features.read_by(hf.classifier)
    vit = _vit(model, encoder, features, readout)
    if name.startswith("Siglip2"):
        vit.call = partial(_patchified, model, vit.patch_size)
    return vit


def adapt_encoder(model: nn.Module) -> ViT:
    """Adapt an encoder without a classifier, to be read with ``readout=``."""
    encoder: Any = getattr(model, "vision_model", model)
    return _vit(model, encoder, _features(encoder, _pooling(encoder, encoder)), None)


def adapt_image_encoder(model: nn.Module) -> ViT:
    """Adapt the image side of CLIP or SigLIP; its readout gives the image embedding."""
    hf: Any = model
    encoder = getattr(hf, "vision_model", hf)
    projection = getattr(hf, "visual_projection", None)
    if projection is not None:
        features = _features(encoder, "cls")
        readout = features.read_by(projection)
    else:
        features = replace(_features(encoder, "all"), pool=ProbePool(encoder.head))
        readout = features.read_by()
    vit = _vit(model, encoder, features, readout)
    call = getattr(hf, "get_image_features", None)
    if "Siglip2" in type(hf).__name__:
        vit.call = partial(_patchified, call or hf, vit.patch_size)
    elif call is not None:
        vit.call = call
    return vit


def _patchified(
    model: Callable[..., Any], patch: tuple[int, int], images: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """A model that takes patches, on images without padding."""
    (p, q), (batch, channels, height, width) = patch, images.shape
    h, w = height // p, width // q
    patches = images.view(batch, channels, h, p, w, q).permute(0, 2, 4, 3, 5, 1).flatten(3)
    shapes = torch.tensor([[h, w]] * batch, device=images.device)
    whole = {"pixel_attention_mask": None, "spatial_shapes": shapes}
    return model(patches.flatten(1, 2), *args, **whole, **kwargs)
