"""What a run explains: a model with its names and its images, and what is recorded of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from captum_classemb.data import Preprocess
from captum_classemb.data.preprocess import ResizeMode
from captum_classemb.errors import DataError, InputError
from captum_classemb.models.elsewhere import OPEN_CLIP, elsewhere, open_clip_tokenizer
from captum_classemb.models.load import load_model
from captum_classemb.models.names import DEMO_MODEL, ClassNames, class_names
from captum_classemb.vit import ViT, adapt, zero_shot

__all__ = ["Subject", "Texts", "lines_of", "load_subject", "of_file"]


@dataclass(frozen=True)
class Texts:
    """The classes of a zero-shot classifier; none, and the model classifies by itself.

    Attributes:
        classes: their names.
        templates: prompts; that of :func:`~captum_classemb.zero_shot` by default.
        features: an npz file with ``text``, C×F, and ``names``, ``scale`` and ``bias`` where they
            are not given or the model's.
    """

    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    features: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.classes or self.features)

    def classifier(self, model: nn.Module, name: str) -> ViT:
        """The zero-shot classifier.

        Raises:
            ClassEmbError: if texts and model do not belong together.
        """
        options: dict[str, Any] = {}
        classes = list(self.classes)
        if self.templates:
            options["templates"] = self.templates
        if self.features is not None:
            arrays = _arrays(self.features)
            classes = classes or [str(name) for name in arrays.get("names", ())]
            options["features"] = torch.from_numpy(arrays["text"]).float()
            options |= {k: float(arrays[k]) for k in ("scale", "bias") if k in arrays}
        elif name.startswith(OPEN_CLIP):
            options["tokenizer"] = open_clip_tokenizer(name)
        return zero_shot(model, classes, **options)

    def describe(self, names: ClassNames) -> dict[str, Any]:
        """What is recorded."""
        record: dict[str, Any] = {"classes": [names[i] for i in range(len(names))]}
        if self.features is not None:
            return {**record, "text_features": of_file(self.features)}
        return {**record, "templates": list(self.templates) or ["a photo of a {}."]}


@dataclass(frozen=True)
class Subject:
    """A loaded model, ready to be explained.

    Attributes:
        vit: the model, adapted.
        name: what it is called.
        weights: where they come from.
        names: of its classes.
        preprocess: what it reads of a photograph.
        zero_shot: what its classes are, if they are texts.
    """

    vit: ViT
    name: str
    weights: dict[str, str]
    names: ClassNames
    preprocess: Preprocess
    zero_shot: dict[str, Any] = field(default_factory=dict)


def load_subject(
    model: str | nn.Module,
    checkpoint: Path | None = None,
    *,
    shape: Mapping[str, int] | None = None,
    names: Sequence[str] | Path = (),
    texts: Texts | None = None,
    preprocess: Preprocess | None = None,
    resize: ResizeMode = "crop",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Subject:
    """Load a model by its name, or take one that is there.

    Args:
        model: a name that :func:`~captum_classemb.models.load_model` knows, or a model.
        checkpoint: its weights.
        shape: ``num_classes``, ``img_size``, ``in_chans``, where they are not the checkpoint's.
        names: of the classes, or a file with one on each line.
        texts: classes that are texts.
        preprocess: what it reads of a photograph, where its library does not know.
        resize: how photographs are brought to its size.
        device: of a model that is loaded.
        dtype: likewise.

    Raises:
        ClassEmbError: if the model cannot be loaded or explained.
    """
    weights = {"source": "given"}
    if isinstance(model, str):
        name = model
        sizes: dict[str, Any] = dict(shape or {})
        model = load_model(name, checkpoint, device=device, dtype=dtype, **sizes)
        weights = _weights(model, name, checkpoint)
    else:
        inner = model.model if isinstance(model, ViT) else model
        name = type(inner).__qualname__
    if not texts and any(hasattr(model, tower) for tower in ("encode_text", "get_text_features")):
        raise InputError(
            f"{name} compares images with texts: name the classes with --class (in Python, "
            "zero_shot)."
        )
    vit = texts.classifier(model, name) if texts else adapt(model)
    images = preprocess or Preprocess.of_model(vit, resize)
    known = _names(names, vit)
    described = texts.describe(known) if texts else {}
    return Subject(vit, name, weights, known, images, described)


def _names(given: Sequence[str] | Path, vit: ViT) -> ClassNames:
    names = lines_of(given) if isinstance(given, Path) else list(given)
    if not names:
        return class_names(vit)
    if vit.has_readout and len(names) != vit.num_classes:
        raise InputError(
            f"{len(names)} names of classes were given: the model has {vit.num_classes} classes."
        )
    return ClassNames([(name,) for name in names])


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The file {path} cannot be read: give text, a name on each line."
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"The text features {path} cannot be read: give an npz file.") from error
    if "text" not in arrays:
        raise DataError(f"The file {path} holds no array text, C×F: save it under this name.")
    return arrays


def of_file(path: Path) -> dict[str, str]:
    """A file and its content, as they are recorded."""
    return {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _weights(model: nn.Module, name: str, checkpoint: Path | None) -> dict[str, str]:
    if checkpoint is not None and Path(checkpoint).is_file():
        return {"source": "file", **of_file(Path(checkpoint))}
    if name == DEMO_MODEL:
        return {"source": "package"}
    if elsewhere(name):
        tag = {} if checkpoint is None else {"tag": str(checkpoint)}
        return {"source": "open_clip" if name.startswith(OPEN_CLIP) else "folder", **tag}
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    known = ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    return {"source": "timm", "name": known or name}
