"""Models that timm does not build: open_clip's by name, Hugging Face's from a folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_classemb.errors import CheckpointError, MissingExtraError, ModelNameError
from captum_classemb.models.names import closest

__all__ = ["OPEN_CLIP", "elsewhere", "load_elsewhere", "open_clip_tokenizer"]

OPEN_CLIP = "open_clip:"


def elsewhere(name: str) -> bool:
    """Whether a name is ``open_clip:NAME`` or a folder with a ``config.json``."""
    return name.startswith(OPEN_CLIP) or (Path(name) / "config.json").is_file()


def load_elsewhere(
    name: str, checkpoint: str | Path | None, *, random_init: bool, seed: int
) -> nn.Module:
    """A model of open_clip or Hugging Face.

    Raises:
        CheckpointError: if weights are missing or do not fit.
        MissingExtraError: if the library is not installed.
        ModelNameError: if the library knows no such model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith(OPEN_CLIP):
            return _open_clip(name.removeprefix(OPEN_CLIP), checkpoint, random_init)
        return _hugging_face(Path(name), checkpoint, random_init)


def _open_clip(name: str, checkpoint: str | Path | None, random_init: bool) -> nn.Module:
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("open_clip_torch", "open_clip") from None
    known = open_clip.list_models()
    if name not in known:
        raise ModelNameError(
            f"open_clip has no model {name!r}: "
            + closest(name, known, "open_clip.list_models() names them.")
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not random_init and checkpoint is None:
        raise CheckpointError(
            f"open_clip:{name} needs weights: give --checkpoint (in Python, checkpoint=), a file"
            + (f" or one of the tags {', '.join(tags)}." if tags else ".")
        )
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        weights = None if random_init else str(checkpoint)
        model: nn.Module = open_clip.create_model(name, pretrained=weights)
    # A failed download or a file that does not fit surfaces as whatever the library raises.
    except Exception as error:
        said = str(error).split("\n")[0][:200]
        raise CheckpointError(
            f"the weights {checkpoint} of open_clip:{name} cannot be loaded "
            f"({type(error).__name__}: {said}): give a local file that fits, or go online."
        ) from error
    finally:
        logging.root.setLevel(level)
    return model


def open_clip_tokenizer(name: str) -> Any:
    """The tokenizer of ``open_clip:NAME``.

    Raises:
        CheckpointError: if it would have to be fetched and cannot.
    """
    import open_clip

    try:
        return open_clip.get_tokenizer(name.removeprefix(OPEN_CLIP))
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer of {name} could not be fetched ({type(error).__name__}): go online, "
            "or give --text-features."
        ) from error


def _hugging_face(folder: Path, checkpoint: str | Path | None, random_init: bool) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "transformers") from None
    if checkpoint is not None:
        raise CheckpointError(f"the folder {folder} holds its weights: leave the checkpoint out.")
    try:
        named = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
        build: Any = getattr(transformers, named[0])
        if random_init:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            model: nn.Module = build(config)
        else:
            model = build.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        said = str(error).split("\n")[0][:200]
        raise CheckpointError(
            f"the folder {folder} holds no model of Hugging Face that can be loaded "
            f"({type(error).__name__}: {said}): give one that save_pretrained wrote."
        ) from error
    return model
