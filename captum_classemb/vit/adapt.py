"""Choose the adapter of a model by the name of its class."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

from torch import nn

from captum_classemb.errors import UnsupportedModelError
from captum_classemb.vit.checks import reading
from captum_classemb.vit.inside import read_encoder, read_inside
from captum_classemb.vit.model import ViT
from captum_classemb.vit.parts import uncompiled

__all__ = ["Adapter", "adapt", "register_adapter"]

Adapter = Callable[[nn.Module], ViT]

_HUGGING_FACE = {
    "vit": {"ViTForImageClassification": "classifier", "ViTModel": "encoder"},
    "vit_msn": {"ViTMSNForImageClassification": "classifier", "ViTMSNModel": "encoder"},
    "deit": {
        "DeiTForImageClassification": "classifier",
        "DeiTForImageClassificationWithTeacher": "classifier",
        "DeiTModel": "encoder",
    },
    "beit": {"BeitForImageClassification": "classifier", "BeitModel": "encoder"},
    "data2vec": {
        "Data2VecVisionForImageClassification": "classifier",
        "Data2VecVisionModel": "encoder",
    },
    "dinov2": {"Dinov2ForImageClassification": "classifier", "Dinov2Model": "encoder"},
    "dinov2_with_registers": {
        "Dinov2WithRegistersForImageClassification": "classifier",
        "Dinov2WithRegistersModel": "encoder",
    },
    "dinov3_vit": {"DINOv3ViTModel": "encoder"},
    "ijepa": {"IJepaForImageClassification": "classifier", "IJepaModel": "encoder"},
    "clip": {
        "CLIPForImageClassification": "classifier",
        "CLIPVisionModel": "encoder",
        "CLIPVisionModelWithProjection": "image_encoder",
        "CLIPModel": "image_encoder",
    },
    "siglip": {
        "SiglipForImageClassification": "classifier",
        "SiglipVisionModel": "image_encoder",
        "SiglipModel": "image_encoder",
    },
    "siglip2": {
        "Siglip2ForImageClassification": "classifier",
        "Siglip2VisionModel": "image_encoder",
        "Siglip2Model": "image_encoder",
    },
}

_ROOM = "captum_classemb.vit"
#: Qualified class names, so that no library is imported before one of its models is seen, with the
#: module and function that adapt them.
_BUILT_IN = {
    **dict.fromkeys(
        (
            "timm.models.vision_transformer.VisionTransformer",
            "timm.models.deit.VisionTransformerDistilled",
            "timm.models.eva.Eva",
            "timm.models.beit.Beit",
            "timm.models.cait.Cait",
            "timm.models.naflexvit.NaFlexVit",
            "timm.models.vision_transformer_relpos.VisionTransformerRelPos",
        ),
        ("timm", "adapt_timm"),
    ),
    "open_clip.transformer.VisionTransformer": ("open_clip", "adapt_tower"),
    "vit_pytorch.vit.ViT": ("vit_pytorch", "adapt_vit_pytorch"),
    "vit_pytorch.simple_vit.SimpleViT": ("vit_pytorch", "adapt_vit_pytorch"),
    "torchvision.models.vision_transformer.VisionTransformer": (
        "torchvision",
        "adapt_torchvision",
    ),
    **{
        f"transformers.models.{family}.modeling_{family}{suffix}.{name}": (
            "huggingface",
            f"adapt_{kind}",
        )
        for family, classes in _HUGGING_FACE.items()
        for suffix in ("_vision" if family == "data2vec" else "",)
        for name, kind in classes.items()
    },
}

_registered: dict[str, Adapter] = {}


def register_adapter(class_name: str) -> Callable[[Adapter], Adapter]:
    """Register a function as the adapter of a class of models.

    Args:
        class_name: the qualified name of the class, ``module.Class``; subclasses are adapted too.

    Returns:
        a decorator for a function that takes the model and returns a
        :class:`~captum_classemb.vit.ViT`.
    """

    def decorate(adapter: Adapter) -> Adapter:
        _registered[class_name] = adapter
        return adapter

    return decorate


def adapt(model: nn.Module) -> ViT:
    """The model behind the interface of this library.

    Args:
        model: a Vision Transformer of timm, torchvision or Hugging Face, or of a registered
            family; or an adapted model, which is returned as it is.

    Returns:
        a :class:`~captum_classemb.vit.ViT`: called, it returns the model's logits.

    Raises:
        UnsupportedModelError: if no adapter fits.

    Examples:
        >>> from captum_classemb.models import demo_vit
        >>> adapt(demo_vit()).prefix_tokens
        1
    """
    if isinstance(model, ViT):
        return model
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model of type {type(model).__qualname__} was given: an nn.Module is needed."
        )
    with reading(model):
        vit = _read(model)
    vit.adapter = _read
    return vit


def _read(model: nn.Module) -> ViT:
    """What the adapter of the model says of it now."""
    inner = _unwrap(model)
    if inner is not None:
        return _read(inner)
    adapter = _adapter_of(model)
    if adapter is not None:
        return adapter(model)
    reason = _known_refusal(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    found = dict(_outermost(model, ""))
    encoders = [m for m in model.named_modules() if type(m[1]) is nn.TransformerEncoder]
    if not found and len(encoders) == 1:
        return read_encoder(model, *encoders[0])
    if not found:
        for inner in model.modules():
            reason = _known_refusal(inner)
            if reason is not None:
                raise UnsupportedModelError(reason)
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if not found:
        raise UnsupportedModelError(
            f"{name} is no Vision Transformer that this library knows, and holds none: see "
            "register_adapter for models of your own."
        )
    if len(found) > 1:
        listed = ", ".join(f"`model.{path}`" for path in found.values())
        raise UnsupportedModelError(
            f"{name} holds {len(found)} Vision Transformers: pass one of {listed}."
        )
    ((vit, path),) = found.items()
    return read_inside(model, path, _read(vit))


def _adapter_of(model: nn.Module) -> Adapter | None:
    for ancestor in type(model).__mro__:
        name = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if name in _registered:
            return _registered[name]
        if name in _BUILT_IN:
            module, function = _BUILT_IN[name]
            adapter: Adapter = getattr(importlib.import_module(f"{_ROOM}.{module}"), function)
            return adapter
    return None


def _outermost(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """The outermost submodules that can be adapted, with their names."""
    for name, child in model.named_children():
        if _adapter_of(child) is not None:
            yield child, path + name
        else:
            yield from _outermost(child, f"{path}{name}.")


def _unwrap(model: nn.Module) -> nn.Module | None:
    """The model inside a wrapper that computes the same: compiled, parallel, or with adapters."""
    module = getattr(model, "module", None)
    if isinstance(module, nn.Module) and type(model).__name__ in _COPIES:
        return module
    if uncompiled(model) is not model:
        return uncompiled(model)
    if type(model).__module__.startswith("open_clip.") and hasattr(model, "visual"):
        return model.visual  # type: ignore[return-value]
    if any(ancestor.__module__.startswith("peft.") for ancestor in type(model).__mro__):
        return model.get_base_model()  # type: ignore[operator, no-any-return]
    return None


_COPIES = {
    "DataParallel",
    "DistributedDataParallel",
    "AveragedModel",
    "ModelEma",
    "ModelEmaV2",
    "ModelEmaV3",
}
"""Classes of torch and timm that compute what their ``module`` computes."""

_NO_SINGLE_GRID = {
    "attends within windows and merges patches between stages": (
        "Swin", "MaxVit", "MaxxVit", "TinyVit", "DaVit", "Nest", "GlobalContextVit",
    ),
    "pools or merges tokens between stages": (
        "Hiera", "Pooling", "PiT", "MultiScale", "Twins", "Pyramid", "CoaT", "Levit", "EdgeNeXt",
        "EfficientFormer", "Visformer", "VOLO",
    ),
    "has two branches with grids of their own": ("CrossVit",),
    "has tokens within tokens": ("TNT",),
}  # fmt: skip

_CONVOLUTIONAL = ("ResNet", "ConvNeXt", "EfficientNet", "MobileNet", "RegNet", "DenseNet", "VGG")

_OTHER_ATTENTION = {
    "Xcit": "attends over channels, not over tokens",
    "ConVit": "mixes attention with positions behind a gate of each head",
}


def _known_refusal(model: nn.Module) -> str | None:
    """Why a known transformer that is no plain one is refused; None for other models."""
    name = type(model).__qualname__
    full = f"{type(model).__module__}.{name}"
    if any(family.lower() in name.lower() for family in _CONVOLUTIONAL):
        return (
            f"{full} is a convolutional network and no Vision Transformer: it has no patch tokens."
        )
    for reason, families in _NO_SINGLE_GRID.items():
        if any(family.lower() in name.lower() for family in families):
            return (
                f"{full} {reason}, so it has no single token grid that all blocks share: "
                "only plain Vision Transformers are supported."
            )
    for family, reason in _OTHER_ATTENTION.items():
        if family.lower() in name.lower():
            return f"{full} {reason}: only plain Vision Transformers are supported."
    return None
