"""Zero-shot classifiers: an image tower whose scores are cosines with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classemb.errors import InputError, MissingExtraError
from captum_classemb.readout import Readout, TextEmbedding
from captum_classemb.vit.adapt import adapt
from captum_classemb.vit.model import ViT, logits_of

__all__ = ["ZeroShot", "zero_shot"]


class ZeroShot(ViT):
    """An image tower that returns the score of each class: B×C.

    Attributes:
        classes: the names of the classes.
    """

    classes: tuple[str, ...]


def zero_shot(
    model: nn.Module,
    classes: Sequence[str],
    *,
    tokenizer: Callable[..., Any] | None = None,
    templates: Sequence[str] = ("a photo of a {}.",),
    features: Tensor | np.ndarray[Any, Any] | None = None,
    scale: float | None = None,
    bias: float | None = None,
    batch_size: int = 64,
) -> ZeroShot:
    """A zero-shot classifier that every method, and Captum's own, takes as a model.

    The score of a class is scale · cos(image, text) + bias. The text of a class is the mean of the
    normalised embeddings of its prompts, normalised again. SigLIP's scores are read by a sigmoid
    each, not by a softmax over the classes: explain them with ``objective="logit"``.

    Args:
        model: a CLIP or SigLIP of open_clip or Hugging Face; or an image tower alone, with
            ``features`` and ``scale``.
        classes: the names of the C classes.
        tokenizer: maps a list of texts to what the text tower takes; open_clip's own, or that of
            the folder which a Hugging Face model came from, by default.
        templates: prompts, ``{}`` standing for the name of the class.
        features: text embeddings C×F that are there already; the text tower is not run then.
        scale: the factor of the cosine; the model's by default.
        bias: added to every score; the model's by default.
        batch_size: prompts that are encoded at once.

    Raises:
        InputError: if there is no class, features are of another shape, or scale, text tower or
            tokenizer are missing.
        UnsupportedModelError: if the image tower is not supported.

    Examples:
        >>> import timm, torch
        >>> from captum_classemb import PatchImportance, zero_shot
        >>> tower = timm.create_model("vit_tiny_patch16_224", num_classes=64).eval()
        >>> model = zero_shot(tower, ["cat", "dog"], features=torch.randn(2, 64), scale=100.0)
        >>> model(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 2])
        >>> PatchImportance(model).attribute_classes(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 2, 14, 14])
    """
    names = (classes,) if isinstance(classes, str) else tuple(classes)
    if not names:
        raise InputError("no class was named: give the names of the classes.")
    image = adapt(model)
    width = _embedding(image).num_classes
    if features is None:
        text = _text(model, names, tokenizer, templates, batch_size)
    else:
        text = torch.as_tensor(features)
        if tuple(text.shape) != (len(names), width):
            turned = tuple(text.shape) == (width, len(names))
            raise InputError(
                f"features have shape {tuple(text.shape)}: {len(names)}×{width} is needed, a row "
                "for each class" + (": pass `.T`." if turned else ".")
            )
    if scale is None:
        known = getattr(model, "logit_scale", None)
        if not isinstance(known, Tensor):
            raise InputError(
                f"{type(model).__qualname__} has no logit_scale: pass scale=, 100 for most CLIPs."
            )
        scale = float(known.detach().exp())
    if bias is None:
        known = getattr(model, "logit_bias", None)
        bias = float(known.detach()) if isinstance(known, Tensor) else 0.0
    read = partial(_with_text, text.to(image.device), float(scale), float(bias))
    found = ZeroShot.__new__(ZeroShot)
    found.__dict__.update(read(image).__dict__)
    found.adapter = lambda inner: read(adapt(inner))
    found.classes = names
    return found


def _embedding(image: ViT) -> Readout:
    """The readout that gives the image embedding: a tower may return its pooled tokens."""
    if not image.has_readout and image.features is not None:
        return image.features.read_by()
    return image.readout


def _with_text(text: Tensor, scale: float, bias: float, image: ViT) -> ViT:
    """The image tower with text embeddings as its readout."""
    readout = TextEmbedding(_embedding(image), text, scale, bias)
    vit = ViT(
        image.model,
        image.blocks,
        readout,
        image.prefix_tokens,
        image.patch_size,
        image.image_size,
        image.channels,
        image._grid,
        image.features,
    )
    vit.resized_to, vit._pixels_of = image.resized_to, image._pixels_of
    vit.call = partial(_scores, image.call or image.model, readout)
    return vit


def _scores(tower: Callable[..., Any], readout: TextEmbedding, *args: Any, **kwargs: Any) -> Tensor:
    embedding = logits_of(tower(*args, **kwargs), "the image tower")
    return readout.scores(embedding).to(embedding.dtype)


# -- Text


def _text(
    model: Any,
    names: Sequence[str],
    tokenizer: Callable[..., Any] | None,
    templates: Sequence[str],
    batch_size: int,
) -> Tensor:
    """The text embedding of each class, of unit norm: C×F."""
    encode = getattr(model, "encode_text", None) or getattr(model, "get_text_features", None)
    if encode is None:
        raise InputError(
            f"{type(model).__qualname__} has no text tower: pass features=, text embeddings C×F."
        )
    if isinstance(templates, str) or not templates or any("{}" not in t for t in templates):
        raise InputError("templates are prompts with {} for the name of the class.")
    hugging_face = hasattr(model, "get_text_features")
    if tokenizer is None:
        tokenizer = _own_tokenizer(model) if hugging_face else _open_clip_tokenizer(model)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    device, found = next(model.parameters()).device, []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        with torch.no_grad():
            if hugging_face:
                options = {"padding": "max_length" if _sigmoid(model) else True}
                tokens = tokenizer(some, return_tensors="pt", truncation=True, **options)
                output = encode(**{k: v.to(device) for k, v in tokens.items()})
            else:
                output = encode(tokenizer(some).to(device))
        found.append(F.normalize(logits_of(output, type(model).__qualname__), dim=-1))
    by_class = torch.cat(found).unflatten(0, (len(names), -1))
    return F.normalize(by_class.mean(1), dim=-1)


def _sigmoid(model: Any) -> bool:
    """SigLIP: its text tower was trained on prompts of full length."""
    return isinstance(getattr(model, "logit_bias", None), Tensor)


def _open_clip_tokenizer(model: Any) -> Callable[..., Any]:
    from open_clip.tokenizer import SimpleTokenizer

    length, vocabulary = getattr(model, "context_length", None), getattr(model, "vocab_size", None)
    if length is None or vocabulary != 49408:
        raise InputError(
            "this text tower has a vocabulary of its own: pass tokenizer=, from "
            "open_clip.get_tokenizer of the model's name."
        )
    tokenizer: Callable[..., Any] = SimpleTokenizer(context_length=int(length))
    return tokenizer


def _own_tokenizer(model: Any) -> Callable[..., Any]:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError("transformers", "transformers") from None
    source = model.config._name_or_path
    try:
        tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # whatever the library raises where files are missing
        raise InputError(
            f"no tokenizer was found beside the model ({source or 'built in memory'}): pass "
            "tokenizer=, or text embeddings as features=."
        ) from error
    return tokenizer
