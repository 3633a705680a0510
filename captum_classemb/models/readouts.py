"""Files of fitted readouts, looked through before anything is made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from captum_classemb.errors import CheckpointError
from captum_classemb.readout import LinearProbe, Readout, TunedLens, load_readout

_ENTRY = re.compile(
    r"(\d{1,4}\.(?:resid_pre|attn_out|resid_mid|mlp_out|resid_post))\.(weight|bias)", re.ASCII
)
_MOST_TOKENS = 2**20


def open_readout(path: str | Path, own: Readout) -> LinearProbe | TunedLens:
    """Read a fitted readout from a file that anyone may have written.

    Args:
        path: a file of :func:`~captum_classemb.readout.save_readout` or of a study.
        own: the readout of the model that it was fitted to, ``adapt(model).readout``.

    Raises:
        CheckpointError: if the file is missing, damaged, or says what cannot be.
        InputError: if it was fitted to a model of another width.
        UnsupportedModelError: if the model has no readout that it could stand for.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            record = (file.metadata() or {}).get("readout")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = None if record is None else json.loads(record)
    # What damaged bytes make the reader stumble over has no common type.
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"the readout {path} cannot be read: {error}.") from error
    if record is not None:
        problem = _problem(about, tensors)
        if problem:
            raise CheckpointError(f"the readout {path} is damaged: {problem}.")
    return load_readout(path, own)


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
