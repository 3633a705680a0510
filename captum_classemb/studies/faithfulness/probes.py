"""The linear probes of the method ``"linear-probe"``, and whether they fit a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from captum_classemb.errors import InputError
from captum_classemb.readout import LinearProbe, load_readout
from captum_classemb.vit import ViT

BY_PROBE = "linear-probe"


def load_probe(path: str | Path | None, methods: Sequence[str], vit: ViT) -> LinearProbe | None:
    """The probes that the method ``"linear-probe"`` reads; None where it was not chosen.

    Raises:
        InputError: if method and file do not come together, or do not fit the model.
        CheckpointError: if the file is missing, or holds no readout.
    """
    wanted = BY_PROBE in methods
    if path is None:
        if wanted:
            raise InputError(
                f"the method {BY_PROBE} reads patches with fitted probes and no file was "
                "given: give one with --probe (in Python, probe=)."
            )
        return None
    if not wanted:
        raise InputError(
            f"the probe {path} is read by no method that was chosen: add {BY_PROBE} to the "
            "methods, or leave it out."
        )
    probe = load_readout(path, vit.readout)
    if not isinstance(probe, LinearProbe):
        raise InputError(
            f"{path} holds a {type(probe).__name__}: the method {BY_PROBE} needs linear probes."
        )
    _check_probe(probe, path, vit)
    return probe


def digest(probe: LinearProbe) -> str:
    """SHA-256 of what a file of probes holds: the bytes of equal ones may lie in another order."""
    digest = hashlib.sha256(repr((probe.prefix_tokens, probe.positions, probe.normed)).encode())
    for (block, site), heads in sorted(probe.heads.items()):
        for tensor in (heads.weight, heads.bias):
            digest.update(repr((block, site, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_probe(probe: LinearProbe, path: str | Path, vit: ViT) -> None:
    """Refuse probes that would read another model's tokens, or only some of its blocks."""
    if probe.num_classes != vit.num_classes:
        raise InputError(
            f"the probe {path} has {probe.num_classes} classes and the model {vit.num_classes}: "
            "give one that was fitted to this model."
        )
    if probe.prefix_tokens != vit.prefix_tokens:
        raise InputError(
            f"the probe {path} was fitted to a model with {probe.prefix_tokens} tokens before the "
            f"patches and this one has {vit.prefix_tokens}: give one that was fitted to this model."
        )
    depth = len(vit.blocks)
    foreign = [block for block, _ in probe.places if block >= depth]
    if foreign:
        raise InputError(
            f"the probe {path} reads block {max(foreign)} and the model has blocks 0 to "
            f"{depth - 1}: give one that was fitted to this model."
        )
    missing = [block for block in range(depth) if (block, "resid_post") not in probe.places]
    if missing:
        raise InputError(
            f"the probe {path} has nothing for resid_post of block {missing[0]}, and the method "
            f"{BY_PROBE} sums over blocks 0 to {depth - 1}: give one that was fitted to all of "
            "them."
        )


def check_positions(positions: Sequence[int], tokens: int) -> None:
    """Refuse probes that were not fitted at all positions of the images."""
    if set(positions) != set(range(tokens)):
        raise InputError(
            f"the probe was fitted at {len(positions)} positions, the last of them "
            f"{max(positions)}, and an image has {tokens} tokens: give one that was fitted at all "
            "positions of such images."
        )
