"""A run is what its settings say: it goes on with the same, or not at all."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from captum_classemb.cli import cli
from captum_classemb.models import demo_vit
from captum_classemb.runs import batches
from captum_classemb.runs.storage import Checkpoint, Checkpoints


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "photos" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.bmp")
    return tmp_path / "photos"


class StopError(Exception):
    """Ends a run as if it had been killed."""


@pytest.fixture
def study(photos: Path, tmp_path: Path) -> Callable[..., Result]:
    def run(*words: str, name: str = "identifiability", stop: int | None = None) -> Result:
        """Run a study, which ends after so many batches as if it had been killed."""
        arguments = ["study", name, "--model", "demo_vit", "--data", str(photos)]
        arguments += ["--output", str(tmp_path / "out"), "--batch-size", "2", "--device", "cpu"]
        arguments += ["--checkpoint-every", "2", *words]
        with pytest.MonkeyPatch.context() as patch:
            load = batches.load_batches

            def stopping(*given: Any) -> Any:
                for place, batch in enumerate(load(*given)):
                    if place == stop:
                        raise StopError
                    yield batch

            patch.setattr("captum_classemb.runs.runner.load_batches", stopping)
            return CliRunner().invoke(cli, arguments)

    return run


def run_json(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out/run.json").read_text())
    return found


def test_run_json_says_all_that_numbers_depend_on(
    study: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    result = study("--resize", "squash")
    assert result.exit_code == 0, result.output
    assert "3 class folders by number: 0 → 0 zero, 1 → 1 one, 2 → 2 two" in result.output
    run = run_json(tmp_path)
    settings = run["settings"]
    assert settings["preprocess"]["resize"] == "squash"
    assert settings["preprocess"]["input_size"] == [3, 64, 64]
    assert len(settings["weights"]) == 64
    assert settings["dtype"] == "float32"
    assert settings["data"]["labels"] == {"by": "number", "index": {"0": 0, "1": 1, "2": 2}}
    assert {"device", "card", "versions"} <= run["environments"][0].keys()
    table = (tmp_path / "out" / run["files"]["table"]).read_bytes()
    assert hashlib.sha256(table).hexdigest() == run["files"]["sha256"]
    rows = list(csv.DictReader(table.decode().splitlines()))
    assert len(rows) == 12
    for row in rows:
        file = Path(row["file"])
        assert hashlib.sha256(file.read_bytes()).hexdigest() == row["sha256"]
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (
            int(row["size"]), int(row["modified"]),
        )  # fmt: skip


def test_the_same_goes_on(study: Callable[..., Result], tmp_path: Path) -> None:
    assert isinstance(study(stop=3).exception, SystemExit)
    result = study("--resume")
    assert result.exit_code == 0, result.output
    once = (tmp_path / "out/identifiability.csv").read_bytes()
    (tmp_path / "out").rename(tmp_path / "first")
    assert study().exit_code == 0
    assert (tmp_path / "out/identifiability.csv").read_bytes() == once


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--resize", "squash"), "preprocess.resize"),
        (("--variant", "paper"), "variant"),
        (("--batch-size", "4"), "batch_size"),
        (("--seed", "1"), "seed"),
        (("--limit", "8"), "limit"),
        (("--random-init",), "weights"),
        (("--labels", "sorted"), "data.labels"),
        (("--save-tokens",), "save_tokens"),
    ],
)
def test_other_settings_are_refused(
    words: tuple[str, ...], what: str, study: Callable[..., Result]
) -> None:
    study(stop=3)
    result = study("--resume", *words)
    assert result.exit_code == 2
    assert f"has {what} = " in result.output or (what == "weights" and "has model" in result.output)


def test_other_weights_of_the_same_name_are_refused(
    study: Callable[..., Result], tmp_path: Path
) -> None:
    study(stop=3)
    state = demo_vit().state_dict()
    state["head.bias"] += 1
    save_file(state, tmp_path / "a.safetensors")
    result = study("--resume", "--checkpoint", str(tmp_path / "a.safetensors"))
    assert result.exit_code == 2 and "has weights = " in result.output


def changed(file: Path, keep_time: bool = False) -> None:
    """Other bytes of the same number."""
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    if keep_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "keep_time", "verify", "refused"),
    [
        ("0/00.bmp", False, False, True),
        ("0/00.bmp", True, True, True),
        # The size and the time are asked, unless all is to be read again.
        ("0/00.bmp", True, False, False),
        # Not read yet: nothing is mixed.
        ("2/11.bmp", False, False, False),
    ],
)
def test_other_bytes_of_a_file_that_was_read_are_refused(
    name: str,
    keep_time: bool,
    verify: bool,
    refused: bool,
    study: Callable[..., Result],
    photos: Path,
) -> None:
    study(stop=3)
    changed(photos / name, keep_time)
    result = study("--resume", *(["--verify"] if verify else []))
    assert result.exit_code == (2 if refused else 0), result.output
    assert ("has changed since the run read it" in result.output) == refused


def test_a_file_that_was_only_touched_is_the_same(
    study: Callable[..., Result], photos: Path
) -> None:
    study(stop=3)
    (photos / "0/00.bmp").touch()
    assert study("--resume").exit_code == 0


@pytest.mark.parametrize("how", ["gone", "another", "renamed", "moved"])
def test_another_set_of_files_is_refused(
    how: str, study: Callable[..., Result], photos: Path
) -> None:
    study(stop=3)
    file = photos / "1/01.bmp"
    if how == "gone":
        file.unlink()
    elif how == "another":
        (photos / "1/99.bmp").write_bytes(file.read_bytes())
    elif how == "renamed":
        file.rename(photos / "1/0.bmp")
    else:
        file.rename(photos / "2/01.bmp")
    result = study("--resume")
    assert result.exit_code == 2 and "has data." in result.output


def test_another_environment_is_warned_of_and_kept(
    study: Callable[..., Result], tmp_path: Path
) -> None:
    study(stop=3)
    run = run_json(tmp_path)
    run["environments"][0]["versions"]["torch"] = "1.0"
    run["environments"][0]["card"] = "another"
    (tmp_path / "out/run.json").write_text(json.dumps(run))
    with pytest.warns(UserWarning, match="goes on with other card and versions"):
        assert study("--resume").exit_code == 0
    cards = [environment["card"] for environment in run_json(tmp_path)["environments"]]
    assert len(cards) == 2 and cards[0] == "another"


@pytest.mark.parametrize("keep", [0, 1])
def test_a_checkpoint_that_lacks_sums_is_refused(
    keep: int, study: Callable[..., Result], tmp_path: Path
) -> None:
    study(stop=3)
    folder = tmp_path / "out/checkpoints"
    newest = next(Checkpoints(folder).load())
    state = dict(list(newest.state.items())[:keep])
    for file in folder.glob("*.ckpt"):
        file.unlink()
    state = state or {"another": torch.zeros(1)}
    Checkpoints(folder).save(Checkpoint(newest.number, newest.done, state))
    result = study("--resume")
    assert result.exit_code == 2 and "is not of this study" in result.output


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 1, "complete": true}', "\x00"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_record_is_refused(
    text: str, complete: bool, study: Callable[..., Result], tmp_path: Path
) -> None:
    study(stop=None if complete else 3)
    (tmp_path / "out/run.json").write_text(text)
    result = study("--resume")
    assert result.exit_code == 2 and "is damaged" in result.output


@pytest.mark.parametrize("content", [None, b"", b"study\n", b"\xff\xfe", b"a,b\n1,2\n"])
def test_a_complete_run_without_its_table_is_refused(
    content: bytes | None, study: Callable[..., Result], tmp_path: Path
) -> None:
    study()
    table = tmp_path / "out/identifiability.csv"
    table.unlink() if content is None else table.write_bytes(content)
    result = study("--resume")
    assert result.exit_code == (0 if content == b"study\n" else 2), result.output


def test_damaged_images_are_left_out_and_named(
    study: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    file = photos / "1/01.bmp"
    file.write_bytes(file.read_bytes()[:-500])
    result = study()
    assert result.exit_code == 2
    assert sum("01.bmp is truncated" in line for line in result.output.splitlines()) == 1
    assert "1 of the images could not be read" in result.output
    run = run_json(tmp_path)
    assert run["complete"] and run["images"] == 11 and len(run["refused"]) == 1


def test_study_says_blocks_from_0(study: Callable[..., Result], tmp_path: Path) -> None:
    result = study()
    printed = {line.split()[1] for line in result.output.splitlines() if "resid_post" in line}
    rows = list(csv.DictReader((tmp_path / "out/identifiability.csv").open()))
    assert printed and printed <= {row["block"] for row in rows if row["site"] == "resid_post"}


@pytest.mark.parametrize("name", ["fourier", "variance", "cka"])
def test_studies_that_need_no_labels_take_any_photographs(
    name: str, study: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    for number, file in enumerate(sorted(photos.rglob("*.bmp"))):
        file.rename(photos / f"{number}.bmp")
    for folder in ("0", "1", "2"):
        (photos / folder).rmdir()
    result = study("--batch-size", "4", name=name)
    assert result.exit_code == 0, result.output
    assert run_json(tmp_path)["settings"]["data"]["layout"] == "images"


def test_labels_that_are_missing_are_missed_before_a_model_loads(
    study: Callable[..., Result], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, other in (("0", "cat"), ("1", "dog")):
        (photos / folder).rename(photos / other)
    monkeypatch.setattr("captum_classemb.study_commands._config", lambda _: pytest.fail("loaded"))
    result = study()
    assert result.exit_code == 2 and "--labels" in result.output
    assert study("--data", "nowhere").exit_code == 2
