"""Explaining with a fitted readout in the place of the model's classifier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from captum_classemb import ClassEmbeddingGradient, ClassEmbeddingProjection
from captum_classemb.cli import cli
from captum_classemb.explain import Options, Run
from captum_classemb.models import demo_vit
from captum_classemb.models.demo import demo_image_paths
from captum_classemb.readout import LinearProbe, ProbeHeads, load_readout, save_readout
from captum_classemb.studies import fit_linear_probe, fit_tuned_lens
from captum_classemb.vit import adapt

DEPTH = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model, folder = demo_vit(), tmp_path_factory.mktemp("readouts")
    images = torch.randn(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(20) % 10)]
    own, width = adapt(model).readout, 96
    other = ProbeHeads(torch.zeros(2, 3, width), torch.zeros(2, 3))
    readouts = {
        "probe": fit_linear_probe(model, batches),
        "lens": fit_tuned_lens(model, batches, sites=["resid_post", "attn_out"], epochs=1),
        "no attention": fit_linear_probe(model, batches, sites=["resid_post"]),
        "other classes": LinearProbe(own, {(5, "resid_post"): other}, 1),
    }
    for name, readout in readouts.items():
        save_readout(readout, folder / name)
    return {name: folder / name for name in readouts}


@pytest.mark.parametrize("name", ["probe", "lens"])
def test_maps_and_identifiability_are_those_of_the_readout(
    tmp_path: Path, files: dict[str, Path], name: str
) -> None:
    run = Run(Options(readout=files[name], targets=["7"], output=tmp_path))
    (outcome,) = run
    assert outcome.error is None
    maps = np.load(tmp_path / f"{demo_image_paths()[0].stem}.npz")
    vit = run.explainer.vit
    readout = load_readout(files[name], vit.readout)
    pixels = run.preprocess.tensor(maps["image"])[None]
    target = torch.tensor([7])
    for method in (ClassEmbeddingProjection, ClassEmbeddingGradient):
        key = "class-embedding-projection"
        if method is ClassEmbeddingGradient:
            key = "class-embedding-gradient"
        expected = method(vit, readout=readout).attribute_patches(pixels, target)
        summed = expected.flatten(1, -3).sum(1).numpy()
        np.testing.assert_allclose(maps[key], summed, rtol=1e-4, atol=1e-6)
    written = json.loads((tmp_path / f"{demo_image_paths()[0].stem}.json").read_text())
    assert written["readout"]["file"] == str(files[name])
    assert written["readout"]["kind"] == type(readout).__name__
    own = Run(Options(targets=["7"], output=tmp_path / "own"))
    assert next(iter(own)).error is None
    plain = np.load(tmp_path / "own" / f"{demo_image_paths()[0].stem}.npz")
    changed = np.abs(plain["identifiability_patches"] - maps["identifiability_patches"])
    # After the last block a tuned lens is the class embedding.
    assert changed[:, : DEPTH - 1].max() > 0
    assert (changed[:, -1].max() == 0) == (name == "lens")


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("no attention", [], "nothing for attn_out of block 0"),
        ("other classes", [], "the readout has 3 classes and the model 10"),
        ("nothing", [], "cannot be read"),
        ("probe", ["--html", "page.html"], "no place for a --readout"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, files: dict[str, Path], name: str, more: list[str], message: str
) -> None:
    path = files.get(name, tmp_path / name)
    arguments = ["explain", "--readout", str(path), "--output", str(tmp_path / "out"), *more]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2 and message in done.output


def test_command_line(tmp_path: Path, files: dict[str, Path]) -> None:
    arguments = ["explain", "--readout", str(files["probe"]), "--output", str(tmp_path)]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and list(tmp_path.glob("*.png"))
