"""Readouts that were fitted, as safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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
_ENTRY = re.compile(
    r"(\d{1,4}\.(?:resid_pre|attn_out|resid_mid|mlp_out|resid_post))\.(weight|bias)", re.ASCII
)
_MOST_TOKENS = 2**20


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
        CheckpointError: if the file is missing, damaged, holds no readout, or says what cannot be.
        InputError: if it was fitted to a model of another width.
        UnsupportedModelError: if the model has no readout that it could stand for.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata.get("readout", "null"))
    # What damaged bytes make the reader stumble over has no common type.
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"the readout {path} cannot be read: {error}.") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} holds no readout: give a file that save_readout or a study wrote."
        )
    problem = _problem(about, tensors)
    if problem:
        raise CheckpointError(f"the readout {path} is damaged: {problem}.")
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


def _problem(about: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """What cannot be, of what a file says and holds."""
    if not isinstance(about, dict) or about.get("kind") not in ("LinearProbe", "TunedLens"):
        return "it does not say which kind of readout it is"
    for name, tensor in tensors.items():
        if not _ENTRY.fullmatch(name):
            return f"its entry {name!r:.60} names no block and site"
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            return f"its entry {name} holds no finite numbers of floating point"
    places = {name.rpartition(".")[0] for name in tensors}
    if not places or any(
        f"{p}.{kind}" not in tensors for p in places for kind in ("weight", "bias")
    ):
        return "a weight or a bias is missing"
    shapes = [(tensors[f"{p}.weight"].shape, tensors[f"{p}.bias"].shape) for p in places]
    if about["kind"] == "TunedLens":
        fits = all(len(w) == 2 and w[0] == w[1] and b == w[:1] for w, b in shapes)
        return None if fits else "its weights and biases do not fit together"
    return _probe_problem(about, shapes)


def _probe_problem(about: Mapping[str, Any], shapes: list[tuple[Any, Any]]) -> str | None:
    prefix, positions = about.get("prefix_tokens"), about.get("positions", 0)
    if type(prefix) is not int or not 0 <= prefix < _MOST_TOKENS:
        return f"prefix_tokens is {prefix!r:.60}"
    if type(about.get("normed")) is not bool:
        return f"normed is {about.get('normed')!r:.60}"
    probes = 2 if prefix else 1
    if positions is not None:
        sound = isinstance(positions, list) and all(
            type(place) is int and 0 <= place < _MOST_TOKENS for place in positions
        )
        if not sound or not positions or len(set(positions)) < len(positions):
            return f"positions is {positions!r:.60}"
        probes = len(positions)
    classes = {weight[1] for weight, _ in shapes if len(weight) == 3}
    fits = all(len(w) == 3 and w[0] == probes and b == w[:2] for w, b in shapes)
    return None if fits and len(classes) == 1 else "its weights and biases do not fit together"
