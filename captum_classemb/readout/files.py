"""Readouts that were fitted, as safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from captum_classemb.errors import CheckpointError, OutputError
from captum_classemb.readout.base import Readout
from captum_classemb.readout.placed import Place
from captum_classemb.readout.probe import LinearProbe, ProbeHeads
from captum_classemb.readout.tuned import Translator, TunedLens

__all__ = ["encode_readout", "load_readout", "save_readout"]

_FORMAT = "captum-classemb readout 1"


def encode_readout(readout: LinearProbe | TunedLens) -> bytes:
    """The content of a file that :func:`load_readout` reads."""
    about: dict[str, Any] = {"kind": type(readout).__name__}
    tensors: dict[str, Tensor] = {}
    if isinstance(readout, LinearProbe):
        about |= {
            "prefix_tokens": readout.prefix_tokens,
            "positions": readout.positions,
            "normed": readout.normed,
        }
        for (block, site), heads in readout.heads.items():
            tensors[f"{block}.{site}.weight"] = heads.weight
            tensors[f"{block}.{site}.bias"] = heads.bias
    else:
        for (block, site), translator in readout.translators.items():
            tensors[f"{block}.{site}.weight"] = translator.matrix
            tensors[f"{block}.{site}.bias"] = translator.bias
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, {"format": _FORMAT, "readout": json.dumps(about)})


def save_readout(readout: LinearProbe | TunedLens, path: str | Path) -> None:
    """Write a fitted readout as a safetensors file.

    What belongs to the model (its norm, and for a tuned lens its classifier) is not written.

    Raises:
        OutputError: if the file cannot be written.

    Examples:
        >>> import tempfile
        >>> from captum_classemb.models import demo_vit
        >>> from captum_classemb.vit import adapt
        >>> own = adapt(demo_vit()).readout
        >>> lens = TunedLens(own, {(2, "resid_post"): Translator.identity(96)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_readout(lens, f"{folder}/lens.safetensors")
        ...     load_readout(f"{folder}/lens.safetensors", own).places
        [(2, 'resid_post')]
    """
    try:
        Path(path).write_bytes(encode_readout(readout))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error


def load_readout(path: str | Path, own: Readout) -> LinearProbe | TunedLens:
    """Read what :func:`save_readout` wrote.

    Args:
        path: the file.
        own: the readout of the model that it was fitted to, ``adapt(model).readout``.

    Raises:
        CheckpointError: if the file is missing, or holds no readout.
        InputError: if it was fitted to a model of another width.
        UnsupportedModelError: if the model has no readout that it could stand for.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the readout {path} cannot be read: {error}.") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} holds no readout: give a file that save_readout or a study wrote."
        )
    about = json.loads(metadata["readout"])
    pairs = {_place(name): _pair(tensors, name) for name in tensors if name.endswith(".weight")}
    if about["kind"] == TunedLens.__name__:
        return TunedLens(own, {place: Translator(*pair) for place, pair in pairs.items()})
    heads = {place: ProbeHeads(*pair) for place, pair in pairs.items()}
    return LinearProbe(own, heads, about["prefix_tokens"], about["positions"], about["normed"])


def _place(name: str) -> Place:
    block, site, _ = name.split(".")
    return int(block), site


def _pair(tensors: dict[str, Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[name], tensors[f"{name.removesuffix('weight')}bias"]
