"""The model that a study measures, and how."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_classemb.functional.variant import Variant


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer: other weights have another."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class StudyConfig:
    """The model that is studied, and how.

    Attributes:
        model: a supported Vision Transformer, or an adapted one.
        name: what tables call it.
        variant: ``"corrected"`` or ``"paper"`` (what the published code computes).
        readout: a Readout to take instead of the model's class embedding.
        seed: of whatever is drawn.
        random_model: makes the randomly initialised control, for studies that compare with one.
        output: the result folder, for studies that write more than tables.
    """

    model: nn.Module
    name: str
    variant: Variant = "corrected"
    readout: nn.Module | None = None
    seed: int = 0
    random_model: Callable[[], nn.Module] | None = None
    output: Path | None = None

    def settings(self) -> dict[str, Any]:
        """What distinguishes this model from others, in terms of JSON."""
        return {
            "model": self.name,
            "weights": weights_digest(self.model),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "variant": self.variant,
            "seed": self.seed,
        }
