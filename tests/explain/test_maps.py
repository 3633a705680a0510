"""Maps of a data set: the numbers of the methods, whatever happens while they are written."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from captum_classemb import ClassEmbeddingProjection, PatchImportance
from captum_classemb.attr import METHODS
from captum_classemb.cli import cli
from captum_classemb.data import Preprocess, read_image
from captum_classemb.errors import DataError, InputError
from captum_classemb.explain import MapOptions, SavedMaps, write_maps
from captum_classemb.models import demo_vit
from captum_classemb.vit import adapt

ROOT = Path(__file__).parents[2]
IMAGES = 11


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        file = folder / ("three" if number % 2 else "seven") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 80)).save(file)
    return folder


def words(photos: Path, output: Path, *more: str) -> list[str]:
    arguments = ["maps", "--data", str(photos), "--output", str(output), "--device", "cpu"]
    return [*arguments, "--batch-size", "2", "--shard", "3", *more]


Maps = Callable[..., Result]


@pytest.fixture
def maps(photos: Path, tmp_path: Path) -> Maps:
    return lambda *more: CliRunner().invoke(cli, words(photos, tmp_path / "out", *more))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but run.json, which holds no numbers."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.json"}


def test_maps_are_those_of_the_method(maps: Maps, photos: Path, tmp_path: Path) -> None:
    result = maps("--target", "label", "--target", "predicted", "--target", "nine", "--target", "0")
    assert result.exit_code == 0, result.output
    saved, model = SavedMaps(tmp_path / "out"), demo_vit()
    preprocess, method = Preprocess.of_model(model), PatchImportance(model)
    assert len(saved) == IMAGES and len(saved.entries) == 4 * IMAGES
    for place in (0, 4, IMAGES - 1):
        entries = saved.entries[4 * place : 4 * place + 4]
        view = preprocess.view(read_image(photos / entries[0].file))
        pixels = preprocess.tensor(view)[None]
        logits = model(pixels)[0].detach()
        label = 7 if entries[0].file.startswith("seven") else 3
        best = int(logits.argmax())
        assert [entry.target for entry in entries] == [label, best, 9, 0]
        assert {(entry.label, entry.predicted) for entry in entries} == {(label, best)}
        for k, entry in enumerate(entries):
            assert entry.score == pytest.approx(float(logits[entry.target]), rel=1e-4, abs=1e-4)
            share = float(logits.softmax(-1)[entry.target])
            assert entry.probability == pytest.approx(share, rel=1e-3, abs=1e-6)
            expected = method.attribute_patches(pixels, torch.tensor([entry.target]))
            summed = expected.flatten(1, -3).sum(1)[0]
            largest = float(summed.abs().max())
            torch.testing.assert_close(saved[place][k], summed, rtol=1e-3, atol=2e-3 * largest)
            spread = method.attribute(pixels, entry.target)[0]
            largest = float(spread.abs().max())
            torch.testing.assert_close(
                saved.pixels(place)[k], spread, rtol=1e-3, atol=2e-3 * largest
            )
    assert torch.equal(saved[-1], saved[IMAGES - 1])
    with pytest.raises(IndexError):
        saved[IMAGES]


def test_fixed_targets_and_another_method(maps: Maps, photos: Path, tmp_path: Path) -> None:
    """Images without labels, and names that are no classes: none are asked for."""
    (photos / "three").rename(photos / "whatever")
    more = ("--target", "4", "--method", "class-embedding-projection", "--keep-as", "float32")
    result = maps(*more)
    assert result.exit_code == 0, result.output
    saved, model = SavedMaps(tmp_path / "out"), demo_vit()
    entry = saved.entries[0]
    assert (entry.label, entry.target) == (-1, 4)
    preprocess = Preprocess.of_model(model)
    pixels = preprocess.tensor(preprocess.view(read_image(photos / entry.file)))[None]
    expected = ClassEmbeddingProjection(model).attribute_classes(pixels, [4])[0]
    torch.testing.assert_close(saved[0], expected, rtol=1e-4, atol=1e-4)


def test_a_label_that_nobody_gave_cannot_be_explained(maps: Maps, photos: Path) -> None:
    for name in ("three", "seven"):
        for file in (photos / name).iterdir():
            file.rename(photos / file.name)
        (photos / name).rmdir()
    result = maps("--target", "label")
    assert result.exit_code == 2 and "labels" in result.output
    assert maps("--target", "predicted").exit_code == 0


def test_index_takes_little_more_than_the_paths(maps: Maps, tmp_path: Path) -> None:
    assert maps("--shard", "1000").exit_code == 0
    saved = SavedMaps(tmp_path / "out")
    size = sum(len(content) for content in contents(tmp_path / "out").values())
    names = sum(len(entry.file) for entry in saved.entries)
    head = 600  # of one shard
    assert size - head - 2 * saved[0].numel() * IMAGES - names <= 256 * IMAGES


def test_workers_processes_and_shards_change_nothing(
    maps: Maps, photos: Path, tmp_path: Path
) -> None:
    """Three processes, of which one gets one shard less; and then more processes than shards."""
    assert maps().exit_code == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = ["-m", "captum_classemb", *words(photos, tmp_path / "many", "--workers", "1")]
    done = subprocess.run(
        [sys.executable, *launcher, *program],
        env=environment, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "many") == contents(tmp_path / "out")
    program = ["-m", "captum_classemb", *words(photos, tmp_path / "few", "--limit", "2")]
    done = subprocess.run(
        [sys.executable, *launcher, *program],
        env=environment, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(SavedMaps(tmp_path / "few")) == 2


def test_killed_and_resumed_gives_the_same_files(maps: Maps, photos: Path, tmp_path: Path) -> None:
    slow = (
        "import time, sys\n"
        "from captum_classemb.explain.shards import ShardWriter as Writer\n"
        "write = Writer._write\n"
        "Writer._write = lambda *given: (time.sleep(0.3), write(*given))\n"
        "from captum_classemb.cli import main\n"
        "main()\n"
    )
    killed = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *words(photos, killed)], env=environment
    )
    deadline = time.monotonic() + 120
    while len(list(killed.glob("*.safetensors"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match="no complete run"):
        SavedMaps(killed)
    # What a machine that goes down may leave of a shard.
    first = killed / "maps-00000.safetensors"
    first.write_bytes(first.read_bytes()[:100])
    result = CliRunner().invoke(cli, words(photos, killed, "--resume"))
    assert result.exit_code == 0, result.output
    assert maps().exit_code == 0
    assert contents(killed) == contents(tmp_path / "out")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_full_disk_leaves_what_can_be_gone_on_with(
    place: int, maps: Maps, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 2 + 4 * place:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    result = maps()
    assert result.exit_code == 2 and "No space left on device" in result.output
    monkeypatch.undo()
    assert maps("--resume").exit_code == 0
    assert CliRunner().invoke(cli, words(photos, tmp_path / "whole")).exit_code == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--target", "3"), "targets"),
        (("--method", "memory-patch-importance"), "method"),
        (("--resize", "squash"), "preprocess.resize"),
        (("--keep-as", "float32"), "kept_as"),
        (("--dtype", "float64"), "weights"),
        (("--shard", "4"), "shard"),
        (("--limit", "4"), "limit"),
    ],
)
def test_other_settings_are_refused(more: tuple[str, ...], what: str, maps: Maps) -> None:
    maps()
    result = maps("--resume", *more)
    assert result.exit_code == 2 and f"has {what} = " in result.output


def test_a_folder_that_holds_something_is_left_alone(maps: Maps, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cat.png").write_bytes(b"mine")
    result = maps()
    assert result.exit_code == 2 and "holds other files" in result.output
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["cat.png"]


def test_damaged_images_are_named_and_left_out(maps: Maps, photos: Path, tmp_path: Path) -> None:
    for name in ("seven/04.png", "seven/06.png", "seven/08.png"):
        (photos / name).write_bytes(b"no image")
    result = maps()
    assert result.exit_code == 2 and "3 of the images could not be read" in result.output
    saved = SavedMaps(tmp_path / "out")
    assert len(saved) == IMAGES - 3 == len(saved.entries)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert len(run["refused"]) == 3
    lines = list(csv.DictReader((tmp_path / "out/index.csv").open()))
    assert len(lines) == IMAGES - 3
    assert "seven/04.png" not in {line["file"] for line in lines}


def test_scores_that_half_precision_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Huge(PatchImportance):
        def image_maps(self, done: Any, index: Any) -> torch.Tensor:
            return torch.full((*index.shape, 64), 1e6)

    from captum_classemb.data import open_dataset

    model = demo_vit()
    data = open_dataset("scenes", Preprocess.of_model(model), labelled=False)
    huge = replace(METHODS["patch-importance"], build=Huge)
    monkeypatch.setitem(METHODS, "patch-importance", huge)
    options = MapOptions(limit=2, progress=False)
    with pytest.raises(InputError, match="too large or too small for float16"):
        write_maps(adapt(model), "demo_vit", data, tmp_path / "out", options)


@pytest.mark.parametrize("command", ["maps", "study", "explain"])
def test_links_that_lead_nowhere_are_named_and_the_rest_goes_on(
    command: str, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abcd":
        Image.new("RGB", (70, 70), "teal").save(folder / f"{name}.png")
    (folder / "nowhere.png").symlink_to("missing.png")
    (folder / "loop.png").symlink_to("loop.png")
    words = {
        "explain": ["explain", str(folder)],
        "maps": ["maps", "--data", str(folder)],
        "study": ["study", "fourier", "--model", "demo_vit", "--data", str(folder)],
    }[command]
    result = CliRunner().invoke(cli, [*words, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.exception is not None
    assert isinstance(result.exception, SystemExit), result.output
    for name in ("nowhere", "loop"):
        assert f"{name}.png does not exist" in result.output
