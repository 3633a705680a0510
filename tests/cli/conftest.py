"""Weights, pictures and a way to explain them from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from command_line import MODEL, Explain
from PIL import Image
from safetensors.torch import save_file

from captum_classemb.cli import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(MODEL)
    # Away from the nearly constant logits of a fresh model.
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png", "three.png"):
        pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((220, 180)).save(folder / name)
    return folder


@pytest.fixture
def explain(checkpoint: Path, tmp_path: Path) -> Explain:
    def run(*arguments: str | Path, model: str | None = MODEL, weights: bool = True) -> Result:
        words = ["explain", *map(str, arguments), "--output", str(tmp_path / "out")]
        if model is not None:
            words += ["--model", model]
        if weights:
            words += ["--checkpoint", str(checkpoint)]
        return CliRunner().invoke(cli, words)

    return run
